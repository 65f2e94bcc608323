# For a machine with an NVIDIA GPU, with the steps of README.md:
#
#     docker build -t distill_d2 .
#     docker run --rm -it --gpus all --shm-size 8g -v "$PWD:/work" --user "$(id -u):$(id -g)" distill_d2 \
#         distill-d2 demo --num-gpus 1
#
# Datasets and output lie in the folder that is mounted as /work.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime

ENV PIP_NO_CACHE_DIR=1
COPY . /opt/distill_d2
WORKDIR /opt/distill_d2
RUN pip install .
RUN distill-d2 install-detectron2

# Any user can run it: what libraries cache, and detectron2's downloads, go below HOME.
RUN useradd --create-home distill && mkdir /work && chown distill /work && chmod 777 /home/distill
USER distill
ENV HOME=/home/distill
WORKDIR /work
# A distilled step on generated images, without a GPU, data or downloads.
RUN distill-d2 benchmark --config-file quickstart/shapes_distill.yaml --size 96 --rounds 1 --device cpu
CMD ["distill-d2", "--help"]
