#!/usr/bin/env bash
# Downloads COCO 2017 (about 20 GB): train and val images and the instance annotations, as detectron2 expects
# them. Run it again after an interruption: it goes on where it stopped and skips what is complete.
#
#   datasets/download_coco_2017.sh [FOLDER]    FOLDER/coco/{train2017,val2017,annotations}; default: this folder
#
# COCO_URL names a mirror with the same layout. An archive is removed once it is unpacked.
set -euo pipefail

root="${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}"
url="${COCO_URL:-http://images.cocodataset.org}"
coco="$root/coco"

fail() {
  echo "download_coco_2017: $*" >&2
  exit 1
}

for program in curl unzip; do
  command -v "$program" >/dev/null || fail "needs the program '$program'; install it"
done
mkdir -p "$coco" || fail "cannot write to '$coco'"

size_of() {
  if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

# fetch PATH BYTES: downloads $url/PATH to $coco, from where an earlier attempt stopped.
fetch() {
  local archive="$coco/${1##*/}" found
  found="$(size_of "$archive")"
  if [ "$found" -gt "$2" ]; then fail "'$archive' has $found bytes, expected $2; remove it and start again"; fi
  if [ "$found" -lt "$2" ]; then
    echo "downloading $url/$1 ($2 bytes, $found are there)"
    curl --fail --location --retry 5 --continue-at - --output "$archive" "$url/$1" ||
      fail "the download of $url/$1 stopped; run this again to go on"
  fi
  found="$(size_of "$archive")"
  [ "$found" -eq "$2" ] ||
    fail "'$archive' has $found bytes, expected $2; run this again to go on, or remove it to start again"
}

# unpack ARCHIVE MARKER [MEMBER...]: unpacks, and only after that writes the marker and removes the archive.
unpack() {
  local archive="$coco/$1" marker="$coco/$2"
  shift 2
  echo "unpacking $archive"
  unzip -q -o "$archive" "$@" -d "$coco" ||
    fail "'$archive' is damaged or the disk is full; make room, or remove the archive and start again"
  : >"$marker"
  rm -f "$archive"
}

# get PATH BYTES [MEMBER...]
get() {
  local name="${1##*/}" path="$1" bytes="$2"
  local marker=".${name%.zip}.complete"
  shift 2
  if [ -f "$coco/$marker" ]; then
    echo "$name is complete"
    return
  fi
  fetch "$path" "$bytes"
  unpack "$name" "$marker" "$@"
}

get annotations/annotations_trainval2017.zip 252907541 \
  annotations/instances_train2017.json annotations/instances_val2017.json
get zips/val2017.zip 815585330
get zips/train2017.zip 19336861798
echo "COCO 2017 is in $coco; set DETECTRON2_DATASETS=$root"
