# tandem on CPUs. Build: docker build --tag tandem .     Run: docker run --rm tandem env
# The build needs a package index for pip, and no other network access. docs/install.md shows how to mount models.

# The full image has the compiler for the native kernels.
FROM python:3.12-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tandem
RUN /opt/tandem/bin/pip install torch==2.13.0 --index-url "$TORCH_INDEX"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY parallel/ parallel/
COPY model/ model/
COPY launcher/ launcher/
COPY tandem/ tandem/
RUN /opt/tandem/bin/pip install '.[serve,encrypted]'
# The kernels need OpenMP's runtime, which the slim image lacks. A build without kernels would be slow, so it fails here.
RUN cp "$(gcc -print-file-name=libgomp.so)" /opt/tandem/lib/libgomp.so.1 \
    && ls /opt/tandem/lib/python3.12/site-packages/model/kernels/_kernels*.so

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tandem \
    && install --directory --owner tandem --group tandem /work
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH LD_LIBRARY_PATH=/opt/tandem/lib USER=tandem PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["tandem"]
CMD ["--help"]
