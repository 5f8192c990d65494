#!/usr/bin/env bash
# SPDX-FileCopyrightText: The artifact-snapshotter Authors
# SPDX-License-Identifier: Apache-2.0

# Puts what a release has into bin/release: for each architecture the program with its unit and
# its software bill of materials, the image, the chart, and the checksums of all of them. One
# commit gives the same bytes anywhere. `make release` builds the programs and the image first.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: deploy/release.sh VERSION, such as v0.1.0}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
out=bin/release
rm -rf "$out"
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# archive DIRECTORY NAME prints NAME in the directory as a tar of the same bytes on any machine.
archive() {
	tar -C "$1" --sort=name --format=gnu --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
		--mode=u=rwX,go=rX -cf - "$2"
}

for arch in amd64 arm64; do
	name=artifact-snapshotter-$version-linux-$arch
	mkdir "$work/$name"
	install -m 0755 "bin/artifact-snapshotter-$arch" "$work/$name/artifact-snapshotter"
	install -m 0644 LICENSE CHANGELOG.md deploy/systemd/artifact-snapshotter.service "$work/$name"
	archive "$work" "$name" | gzip -9n > "$out/$name.tar.gz"
	# It stamps the time of the day. -trimpath gives the tool itself, whose checksum is in the
	# bill, the same bytes anywhere.
	GOFLAGS="${GOFLAGS:-} -trimpath" go run github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.9.0 \
		bin -json -noserial -version "$version" "bin/artifact-snapshotter-$arch" |
		sed "s/\"timestamp\": \"[^\"]*\"/\"timestamp\": \"$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)\"/" > "$out/$name.cdx.json"
done

archive bin image > "$out/artifact-snapshotter-$version-image.tar"

cp -r deploy/chart/artifact-snapshotter "$work/artifact-snapshotter"
rm -r "$work/artifact-snapshotter/ci"
sed -i "s/^version: .*/version: ${version#v}/; s/^appVersion: .*/appVersion: ${version#v}/" "$work/artifact-snapshotter/Chart.yaml"
archive "$work" artifact-snapshotter | gzip -9n > "$out/artifact-snapshotter-chart-${version#v}.tgz"

cd "$out"
sha256sum -- * > SHA256SUMS
