# What docker-compose.yml takes from a registry, from Debian's packages instead: see debian.yml.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS redis
RUN apt-get update \
    && apt-get install --yes --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001

FROM ${BASE} AS prometheus
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 65534 --group 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
