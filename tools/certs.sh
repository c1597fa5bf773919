#!/bin/sh
# certs.sh PYTHON DIRECTORY: a self-signed certificate for localhost as DIRECTORY/cert.pem and key.pem, unless both are there.
set -eu
python=$1 directory=$2

if [ -e "$directory/cert.pem" ] && [ -e "$directory/key.pem" ]; then
    exit
fi
if [ -e "$directory/cert.pem" ] || [ -e "$directory/key.pem" ]; then
    echo "$directory/ holds only one of cert.pem and key.pem: put the other beside it, or take this one away." >&2
    exit 1
fi
echo "Making a self-signed certificate for localhost in $directory/"
mkdir -p "$directory"
new=$(mktemp -d "$directory/.new.XXXXXX") # readable by its owner alone; mv within one file system is atomic
trap 'rm -rf "$new"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
"$python" -m trustme --quiet --dir "$new"
mv "$new/server.pem" "$new/cert.pem"
mv "$new/server.key" "$new/key.pem"
chmod 600 "$new/key.pem"
mv "$new/key.pem" "$new/cert.pem" "$directory/"
