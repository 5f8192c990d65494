module github.com/artifact-snapshotter/artifact-snapshotter/integration/crash/recorder

go 1.26.6

require github.com/hanwen/go-fuse/v2 v2.12.1

require golang.org/x/sys v0.28.0 // indirect
