# docker build -t solovla .
# docker run --rm --gpus all --shm-size=2g --user "$(id -u):$(id -g)" -v "$PWD/runs:/opt/solovla/runs" solovla make train
# docs/install.md says more. The CUDA version is that of the wheel of torch, which brings its own CUDA libraries.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# all: SAPIEN draws on the GPU, which the default (compute, utility) leaves out
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=all \
    HOME=/home/solovla \
    PATH=/opt/solovla/.venv/bin:$PATH

WORKDIR /opt/solovla
COPY container/install.sh container/
RUN container/install.sh system
COPY requirements.txt .
RUN container/install.sh packages
COPY . .
RUN container/install.sh finish

USER solovla
CMD ["python", "doctor.py"]
