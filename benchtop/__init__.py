"""The bench: the code that no experiment changes, so that results stay comparable.

Data flow one way: text -> tokenizer folder -> shards and manifest -> batches -> run folder -> tables. Each
file is one idea and imports only files that precede it in ORDER. No file imports an experiment.
"""

ORDER = (
    # shared by all
    "errors", "places", "redaction", "files", "host", "gpus", "workers", "processes", "launch", "apart",
    "command_line", "significance",
    # text -> tokenizer folder
    "decoding", "documents", "held_out", "hub", "sources", "tokenizer", "bpe",
    # -> shards and manifest
    "shards", "xz", "unfinished", "prepare", "mixing", "ready_made",
    # -> batches, on a machine
    "batches", "machine", "measure", "speed", "memory", "initial", "signals", "steps",
    "recorded",
    # -> evaluation of a model
    "evaluation", "tasks", "scoring", "sampling",
    # -> run folder
    "identity", "checkpoints", "folder", "knobs", "trackers", "loss_picture", "log", "budget", "saved",
    # -> conclusions from runs; a run with --compare_to draws them too
    "groups", "progress", "conclusions", "briefing", "smoke", "compiled_check", "warm_up", "run", "synthetic",
    "fitness", "throughput",
    # -> presentation
    "tables", "curves", "page", "endpoint", "judging",
    # -> from an idea to a verdict
    "sequential", "ledger", "ledger_page", "ideas", "turns", "trials", "confirm",
)
