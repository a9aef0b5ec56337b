# The page and the API of `packforcing serve` on the CPU.
#   docker build --tag packforcing .
#   docker run --publish 127.0.0.1:8000:8000 --volume packforcing:/videos packforcing
# The URL with its token is printed; open it with localhost as its host.
FROM python:3.11-slim
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[cpu,serve]" \
    && rm -r /source \
    && useradd --uid 1000 packforcing \
    && install --directory --owner 1000 /videos
USER 1000
WORKDIR /videos
VOLUME /videos
EXPOSE 8000
ENTRYPOINT ["packforcing", "serve", "--host", "0.0.0.0", "--out", "/videos"]
