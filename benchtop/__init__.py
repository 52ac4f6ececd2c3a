"""The bench: what no experiment changes, so that numbers stay comparable.

Data flow one way: text -> tokenizer folder -> shards and manifest -> batches -> run folder -> tables. Each
file here is one idea and imports only files before it in ORDER; none imports an experiment.
"""

ORDER = (
    # what all share
    "errors", "places", "redaction", "files", "host", "gpus", "workers", "processes", "launch", "apart",
    "command_line", "significance",
    # text -> tokenizer folder
    "decoding", "documents", "held_out", "hub", "sources", "tokenizer", "bpe",
    # -> shards and manifest
    "shards", "xz", "unfinished", "prepare", "mixing", "ready_made",
    # -> batches, on a machine
    "batches", "machine", "measure", "speed", "memory", "initial", "signals", "steps",
    "recorded",
    # -> numbers of a model
    "evaluation", "tasks", "scoring", "sampling",
    # -> run folder
    "identity", "checkpoints", "folder", "knobs", "trackers", "loss_picture", "log", "budget", "saved",
    # -> what can be concluded from runs; a run that ends with --compare_to asks it, too
    "groups", "progress", "conclusions", "briefing", "smoke", "compiled_check", "warm_up", "run", "synthetic",
    "fitness", "throughput",
    # -> how it is shown
    "tables", "curves", "page", "endpoint", "judging",
    # -> from an idea to a verdict
    "sequential", "ledger", "ledger_page", "ideas", "turns", "trials", "confirm",
)
