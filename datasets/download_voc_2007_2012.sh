#!/usr/bin/env bash
# Downloads PASCAL VOC 2007 and 2012 (about 3 GB) as detectron2 expects them. Run it again after an
# interruption: it goes on where it stopped and skips what is complete.
#
#   datasets/download_voc_2007_2012.sh [FOLDER]    FOLDER/VOC2007, FOLDER/VOC2012; default: this folder
#
# VOC_URL names a mirror with the same layout. An archive is removed once it is unpacked.
set -euo pipefail

root="${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}"
url="${VOC_URL:-http://host.robots.ox.ac.uk/pascal/VOC}"

fail() {
  echo "download_voc_2007_2012: $*" >&2
  exit 1
}

for program in curl tar; do
  command -v "$program" >/dev/null || fail "needs the program '$program'; install it"
done
mkdir -p "$root" || fail "cannot write to '$root'"

md5_of() {
  if command -v md5sum >/dev/null; then md5sum "$1" | cut -d ' ' -f 1; else md5 -q "$1"; fi
}

# fetch PATH MD5: downloads $url/PATH to $root, from where an earlier attempt stopped.
fetch() {
  local archive="$root/${1##*/}" found
  if [ -f "$archive" ] && [ "$(md5_of "$archive")" = "$2" ]; then return; fi
  echo "downloading $url/$1"
  curl --fail --location --retry 5 --continue-at - --output "$archive" "$url/$1" ||
    fail "the download of $url/$1 stopped; run this again to go on, or remove '$archive' to start again"
  found="$(md5_of "$archive")"
  [ "$found" = "$2" ] ||
    fail "'$archive' has the md5 sum $found, expected $2; remove it and start again"
}

# The archives hold VOCdevkit/VOC<year>/...; the first folder is left out.
unpack() {
  local archive="$root/$1"
  echo "unpacking $archive"
  tar -xf "$archive" -C "$root" --strip-components 1 ||
    fail "'$archive' cannot be unpacked; is the disk full?"
  : >"$root/$2"
  rm -f "$archive"
}

# get PATH MD5
get() {
  local name="${1##*/}"
  local marker=".${name%.tar}.complete"
  if [ -f "$root/$marker" ]; then
    echo "$name is complete"
    return
  fi
  fetch "$1" "$2"
  unpack "$name" "$marker"
}

get voc2007/VOCtrainval_06-Nov-2007.tar c52e279531787c972589f7e41ab4ae64
get voc2007/VOCtest_06-Nov-2007.tar b6e924de25625d8de591ea690078ad9f
get voc2012/VOCtrainval_11-May-2012.tar 6cd6e144f989b92b3379bac3b3de84fd
echo "VOC 2007 and 2012 are in $root; set DETECTRON2_DATASETS=$root"
