# The image of every part of Outgate: the gate, the relay, the jobs. docs/kubernetes.md says how to build and to pin it.
#
#   docker build --build-arg BASE=python:3.13-slim-bookworm@sha256:... --tag outgate:0.1.0 .
#
# BASE is a Debian with Python 3.12 or newer as `python3`, python3-venv where that is a package of its own, and a shell to build with.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY requirements/ requirements/
# Nothing is compiled and nothing is taken whose hash is not in the repository; the build tools stay behind.
RUN python3 -m venv /opt/outgate \
    && /opt/outgate/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --require-hashes --no-deps --requirement requirements/run.txt
RUN python3 -m venv /tools \
    && /tools/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --require-hashes --no-deps --requirement requirements/dev.txt
COPY pyproject.toml README.md LICENSE ./
COPY addons/ addons/
COPY pki/ pki/
COPY policies/ policies/
COPY proxy/ proxy/
RUN /tools/bin/pip wheel --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir /wheel . \
    && /opt/outgate/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps /wheel/*.whl \
    && /opt/outgate/bin/python -m compileall -q /opt/outgate/lib \
    && /opt/outgate/bin/python -m pip uninstall --yes --quiet pip

FROM ${BASE}
# libnftables: `outgate firewall`, in the init container of a sidecar. ca-certificates: the public roots. util-linux:
# `setpriv`, by which a sidecar's gate that carries datagrams stops being root.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libnftables1 util-linux \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
COPY --from=build /opt/outgate /opt/outgate
ENV PATH=/opt/outgate/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 HOME=/nonexistent

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Outgate" \
    org.opencontainers.image.description="Transparent egress proxy with TLS/SNI inspection" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# The uid that the rules of a sidecar let out (outgate firewall --gate-uid). It owns no file of the image.
USER 1337:1337
EXPOSE 3128 15001 15053/udp 15053 9901
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/opt/outgate/bin/outgate", "status"]
ENTRYPOINT ["/opt/outgate/bin/outgate"]
CMD ["serve"]
