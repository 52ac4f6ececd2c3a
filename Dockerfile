# docker build -t benchtop . && docker run --gpus all -v "$PWD/experiments:/benchtop/experiments" benchtop
FROM pytorch/pytorch:2.9.0-cuda12.8-cudnn9-devel
RUN apt-get update && apt-get install -y --no-install-recommends git python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /benchtop
COPY . .
# run.sh finds the image's torch and installs the rest into .venv
RUN ./run.sh setup
ENTRYPOINT ["./run.sh"]
