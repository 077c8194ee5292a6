# GPU image: docker build -t nrat_scale . && docker run --gpus all --shm-size 8g -v $PWD/data:/app/data -v $PWD/runs:/app/runs nrat_scale recipes/wrn28_10_gen1m.yaml
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Nothing here needs root. User 1000 of Ubuntu's image is replaced.
RUN (userdel -r ubuntu 2>/dev/null || true) && useradd --create-home --uid 1000 nrat \
    && mkdir -p /app/data /app/runs && chown -R nrat /app
USER nrat
WORKDIR /app

ENV VIRTUAL_ENV=/home/nrat/venv PATH=/home/nrat/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir --upgrade pip

# Dependencies first, so that a change of the code does not reinstall torch.
COPY --chown=nrat pyproject.toml README.md ./
RUN mkdir nrat_scale && touch nrat_scale/__init__.py && pip install --no-cache-dir ".[demo]" && pip uninstall -y nrat-scale

COPY --chown=nrat . .
RUN pip install --no-cache-dir --no-deps --editable .

ENTRYPOINT ["accelerate", "launch", "-m", "nrat_scale.train"]
CMD ["--help"]
