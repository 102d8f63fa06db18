# Contains the project and everything that `make setup` installs. The CUDA runtime comes with torch's wheels, so a slim
# Python image is enough. The host needs NVIDIA's driver and its container toolkit.
#
#   docker build --tag ddp-trainer .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD:/work" ddp-trainer ddp-doctor
#
# Datasets and runs are read and written in the current folder, which is /work in the container.
FROM python:3.11-slim
COPY . /opt/ddp-trainer
RUN bash /opt/ddp-trainer/scripts/setup.sh && rm -rf /root/.cache
ENV PATH=/opt/ddp-trainer/.venv/bin:$PATH HOME=/tmp
WORKDIR /work
CMD ["ddp-doctor"]
