# One image for training, benchmarks and tests: docker build --tag fastav .
#
# BASE      any Debian or Ubuntu whose python3 is 3.11 to 3.13. CUDA comes with PyTorch's wheels and the driver from the
#           host, so a base with CUDA in it adds nothing but gigabytes.
# PACKAGES  more of the base's packages, such as ffmpeg, which torchcodec and SPDL want in `python -m benchmarks data`.
# REVISION  the commit, for the label and each run's env.json: --build-arg REVISION="$(git rev-parse HEAD)"
#
# An own package index: --secret id=pip,src=pip.conf; the file is there while pip runs and in no layer.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS dependencies
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/fastav
COPY pyproject.toml constraints.txt ./
# The package is installed in place while empty files stand in for its source: a change of the source then is a layer
# of a few megabytes, and neither fetches PyTorch again nor makes the nodes pull it again.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    mkdir -p fastav kernels/fastav_kernels \
    && touch README.md LICENSE fastav/__init__.py kernels/fastav_kernels/__init__.py \
    && pip install --upgrade --constraint constraints.txt pip \
    && pip install --constraint constraints.txt --editable ".[dev,bench]"

# hadolint ignore=DL3006
FROM ${BASE}
ARG PACKAGES=""
# gcc is no leftover of the build: on a GPU, Triton compiles the few lines of C that launch a kernel when it first meets
# it, with gcc or clang and Python's headers (tcc, a tenth of the size, does not know -l:libcuda.so.1). There is no
# other build tool; torch.compile on a CPU wants PACKAGES=g++.
# ibverbs-providers: NCCL loads it where there is InfiniBand, and else falls back to TCP.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc ibverbs-providers libpython3-dev python3 tini ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --non-unique --uid 1000 --user-group --create-home fastav \
    && chmod 1777 /home/fastav
COPY --from=dependencies /opt/venv /opt/venv
# Any user id will do, also one without a name in /etc/passwd: the home is everyone's, and USER is where Python looks
# for the name first. `video` is what brings NVDEC's libnvcuvid into the container.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/fastav \
    USER=fastav \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,video,utility
WORKDIR /opt/fastav
COPY . .
# Whatever the umask of the checkout was; and data/ and runs/ may be written here, by anyone, beside files of root's.
RUN chmod -R a+rX . && chmod 1777 .
USER 1000:1000
RUN fastav doctor --no-gpu
ARG REVISION=""
ENV FASTAV_REVISION=${REVISION}
LABEL org.opencontainers.image.title="fastav" \
    org.opencontainers.image.description="Trains audiovisual classifiers on video clips as fast as the hardware allows" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"
# tini passes signals on to its child alone (no -g): launch/node.sh and torchrun tell their ranks themselves, which then
# save and end with 75; a signal that reached all processes at once would kill torchrun's ranks in the middle of it.
ENTRYPOINT ["tini", "--"]
CMD ["fastav", "--help"]
