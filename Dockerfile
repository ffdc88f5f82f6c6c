# A server of omni_jax; see docs/serving.md. Weights are mounted, not copied.
#   docker build -t omni-jax .                                        for CPU
#   docker build -t omni-jax --build-arg EXTRAS=serve,hub,cuda .      with CUDA, for docker run --gpus all
FROM python:3.12-slim

ARG EXTRAS=serve,hub

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY convert convert
COPY omni_jax omni_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src/* \
    && useradd --create-home --uid 1000 omni && install --directory --owner omni /cache

USER omni
WORKDIR /home/omni
# Compiled programs, and models that are named by id: mount a volume here to keep them.
ENV OMNI_JAX_CACHE=/cache HF_HOME=/cache/hub PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Listens on all addresses of the container, so it needs OMNI_JAX_API_KEY, or --api-key, to start.
ENTRYPOINT ["omni-jax", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
