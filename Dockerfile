# Two images of the same server:
#
#   docker build --target cuda -t skipkv-vllm:cuda .    official vLLM image + this package with its CUDA operators
#   docker build --target cpu  -t skipkv-vllm:cpu .     CPU build of vLLM, for trying things out
#
# Both take the arguments of `vllm serve`. The CUDA version must match that of the vLLM image.

# ---- CUDA: compile with the full toolkit, keep only the wheel

FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS toolkit

FROM vllm/vllm-openai:v0.33.0 AS build-cuda
# Compiling does not link the driver, so the build needs no GPU.
COPY --from=toolkit /usr/local/cuda-13.0 /opt/cuda
ENV CUDA_HOME=/opt/cuda SKIPKV_BUILD_CUDA=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && uv pip install --system --no-cache "setuptools>=77,<81"
WORKDIR /src
COPY . .
# Fail the build if an operator library did not compile.
RUN python3 setup.py -q bdist_wheel --dist-dir /wheels \
    && python3 -m zipfile -l /wheels/*.whl > /wheels/contents \
    && grep -q _skipkv_cuda.so /wheels/contents \
    && grep -q _skipkv_cpu.so /wheels/contents

FROM vllm/vllm-openai:v0.33.0 AS cuda
# All dependencies of the package are dependencies of vLLM. The last line refuses an untested vLLM.
RUN --mount=type=bind,from=build-cuda,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/*.whl \
    && python3 -c "from skipkv_vllm.integration.compat.version import check_sources; check_sources()"
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]

# ---- CPU

FROM python:3.11-slim-bookworm AS cpu
# vLLM's library needs libnuma, and PyTorch compiles with g++ at server start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 skipkv
WORKDIR /app
COPY . .
RUN SKIPKV_DEVICE=cpu scripts/bootstrap.sh \
    && test -f skipkv_vllm/ops/_skipkv_cpu.so \
    && .venv/bin/python -c "from skipkv_vllm.integration.compat.version import check_sources; check_sources()" \
    && rm -rf /root/.cache build
ENV PATH=/app/.venv/bin:$PATH VLLM_CPU_KVCACHE_SPACE=4
USER 1000
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["/app/skipkv_vllm/models/tiny-reasoner", "--kv-policy", "skipkv", "--kv-budget", "256"]
