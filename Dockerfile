# The CPU image passes the tests; VARIANT picks what JAX runs on.
#   docker build -t w2s_jax .                                  && docker run --rm w2s_jax
#   docker build -t w2s_jax:cuda --build-arg VARIANT=cuda .    && docker run --rm --gpus all w2s_jax:cuda ...
#   docker build -t w2s_jax:tpu  --build-arg VARIANT=tpu .     && docker run --rm --privileged --net=host w2s_jax:tpu ...
# Without a command the container runs the tests; any other command runs instead, for instance
#   docker run --rm -v "$PWD/runs:/home/user/w2s_jax/runs" w2s_jax python -m experiments.weak_to_strong
FROM python:3.12-slim

# cpu, cuda or tpu
ARG VARIANT=cpu
ARG UID=1000

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLBACKEND=Agg \
    PATH=/home/user/venv/bin:$PATH

RUN useradd --create-home --uid "$UID" user
USER user
WORKDIR /home/user/w2s_jax
RUN python -m venv /home/user/venv

# The dependencies change less often than the code: their layer is kept between builds.
COPY --chown=user:user setup.py pyproject.toml README.md ./
RUN case "$VARIANT" in \
      cpu) extras=test ;; \
      cuda|tpu) extras="test,$VARIANT" ;; \
      *) echo "VARIANT is cpu, cuda or tpu, not '$VARIANT'" >&2; exit 1 ;; \
    esac \
    && pip install ".[$extras]" \
    && pip uninstall --yes w2s_jax

COPY --chown=user:user . .
RUN pip install --no-deps --editable .

CMD ["python", "-m", "pytest", "-n", "2"]
