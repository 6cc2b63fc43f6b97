# docker build -t speedrun . && docker run --gpus all --ipc=host -v "$PWD/data:/speedrun/data" speedrun
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc git \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /speedrun
COPY requirements.txt ./
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir -r requirements.txt \
 && cp requirements.txt .venv/
COPY . .
ENTRYPOINT ["./run.sh"]
