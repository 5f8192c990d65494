# SPDX-FileCopyrightText: The artifact-snapshotter Authors
# SPDX-License-Identifier: Apache-2.0

# make demo   shows the main job on a real node in temporary directories
# make test   runs a selection of every test, those on real nodes included
# Both need root, Go and a Debian or Ubuntu machine, and say what they install.

GOLANGCI_LINT := v2.15.0
GOTESTSUM     := v1.13.0
VERSION       := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
BIN           := bin/artifact-snapshotter
TOOLS         := integration/tools/bin
PACKAGES      := gcc libc6-dev pkg-config libseccomp-dev e2fsprogs libarchive-tools xfsprogs btrfs-progs busybox-static containernetworking-plugins systemd dbus yamllint

# Without this, Go refuses to build in a checkout that belongs to another user
# than root; the version is stamped by the linker anyway.
export GOFLAGS := $(strip $(shell go env GOFLAGS) -buildvcs=false)

.PHONY: build image release tools containerd-older kubelet cluster-tools helm packages packages-kernels demo test test-all test-hostile test-crash test-soak test-filesystems test-kernels test-cluster test-deploy test-unit test-node test-matrix fuzz lint bench bench-nri bench-peers clean

build:
	@echo "==> building $(BIN)"
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN) ./cmd/artifact-snapshotter

# The container image for both architectures, as an OCI image layout, without a
# container engine: bin/crane push --index bin/image REFERENCE
# Times in it are the commit's, so that a commit has one digest.
IMAGE := bin/image
image:
	@set -e; for arch in amd64 arm64; do \
		echo "==> building $(BIN)-$$arch"; \
		CGO_ENABLED=0 GOARCH=$$arch go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN)-$$arch ./cmd/artifact-snapshotter; \
	done
	@echo "==> building $(IMAGE)"
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)} go run -C deploy/image . \
		-out $(CURDIR)/$(IMAGE) -version $(VERSION) amd64=$(CURDIR)/$(BIN)-amd64 arm64=$(CURDIR)/$(BIN)-arm64
	go build -C integration/tools -o $(CURDIR)/bin/ github.com/google/go-containerregistry/cmd/crane

# What is published: make release VERSION=v0.1.0
release: image
	@echo "==> making bin/release"
	deploy/release.sh $(VERSION)

install_packages = @missing=; for p in $(1); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		echo "==> installing Debian packages:$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	fi

# Debian packages that the tools are built with and the tests use.
packages:
	$(call install_packages,$(PACKAGES))

# Those that virtual machines with Debian's kernels take.
packages-kernels:
	$(call install_packages,qemu-system-x86 kmod debian-archive-keyring)

# containerd, runc, crictl and what else a node is made of, at the versions
# pinned in integration/tools/go.mod. Go's build cache makes the second time
# quick.
tools: packages
	@echo "==> building containerd, runc, crictl, critest, ctr, crane, oras and a registry (some minutes the first time)"
	cd integration/tools && go build -tags seccomp -o bin/ tool && go test -c -o bin/critest sigs.k8s.io/cri-tools/cmd/critest

# The newest of each older minor version of containerd that is supported; the newest
# of all is pinned in integration/tools/go.mod. They are built where Go keeps their
# source, with their own go.mod: `go install` refuses those that exclude modules.
CONTAINERD_OLDER := 2.1.9 2.2.9 2.3.7
containerd-older: packages
	@set -e; for v in $(CONTAINERD_OLDER); do \
		echo "==> building containerd $$v (a minute the first time)"; \
		source=$$(go mod download -json github.com/containerd/containerd/v2@v$$v | sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p'); \
		go build -C "$$source" -ldflags "-s -w" -o $(CURDIR)/$(TOOLS)-$$v/ ./cmd/containerd ./cmd/containerd-shim-runc-v2 ./cmd/ctr; \
	done

# helm refuses a chart whose kubeVersion excludes the version that a plain build has.
KUBERNETES_STAMP := $(foreach package,k8s.io/component-base/version k8s.io/client-go/pkg/version, \
	-X $(package).gitVersion=v1.37.2 -X $(package).gitMajor=1 -X $(package).gitMinor=37)

# The kubelet that TestKubelet and the benchmarks run: five minutes on two cores
# the first time, so that nothing else waits for it.
kubelet: packages
	@echo "==> building kubelet (5 minutes the first time)"
	cd integration/tools/kubelet && CGO_ENABLED=0 go build -ldflags "-s -w $(KUBERNETES_STAMP)" -o ../bin/ tool

# etcd, the API server, the controller manager, the scheduler and kubectl of the test
# cluster, in one program. Beside kubelet, with which it shares packages, it takes 3
# minutes on two cores, alone 8.
cluster-tools: packages
	@echo "==> building Kubernetes (8 minutes the first time)"
	cd integration/tools/cluster && CGO_ENABLED=0 go build -ldflags "-s -w $(KUBERNETES_STAMP)" -o ../bin/kubernetes .

# helm and chart-testing's ct, for the chart in deploy/.
helm: packages
	@echo "==> building helm and ct (a minute and a half the first time)"
	cd integration/tools/helm && CGO_ENABLED=0 go build -ldflags "-s -w" -o ../bin/ tool

demo: build tools
	@echo "==> running the demo"
	go run ./integration/demo

# Nothing here builds CRI-O: that its tests are skipped must not go unnoticed.
tell_crio = @for p in crio pinns conmon; do \
	PATH="$${ARTIFACT_SNAPSHOTTER_CRIO:-$(TOOLS)}:$(TOOLS):$$PATH" command -v $$p >/dev/null || \
	echo "==> NOT TESTED: CRI-O, for there is no $$p; CONTRIBUTING.md says how to get it"; done

# gotestsum prints the packages as they end, then what was skipped and what failed, each test
# with its own output. Since a node that fails prints long logs, .ci/failed prints the lines of
# the tests themselves once more.
gotest = mkdir -p bin; go run gotest.tools/gotestsum@$(GOTESTSUM) --format pkgname --format-hide-empty-pkg --jsonfile bin/$(1) -- -parallel 4 -timeout 60m $(2) || { \
	echo "==> what failed (all output is in bin/$(1)):"; .ci/failed bin/$(1) bin/$(1); exit 1; }

# What a contributor runs: every test, with -short, which makes the selections of the
# expensive ones smaller. Four tests of a package run side by side: those on nodes mostly
# wait.
test: build tools kubelet helm
	@echo "==> testing what is in deploy/"
	cd deploy/verify && CGO_ENABLED=0 go test -short -count=1 ./...
	@echo "==> running all tests, those on real nodes included"
	@$(call gotest,test.json,-short ./...)
	$(tell_crio)
	@echo "==> NOT TESTED by make test: the larger selections and data races, which make test-all has"

# Every test with its larger selection and the race detector. All of the selections takes
# hours: test-crash, test-soak, test-filesystems, test-kernels, test-hostile, test-matrix.
test-all: build tools kubelet cluster-tools test-deploy
	@echo "==> running all tests with their larger selections and the race detector"
	@$(call gotest,test-all.json,-race ./...)
	$(tell_crio)
	@echo "==> NOT TESTED by make test-all: all of test-crash, test-soak, test-filesystems, test-kernels, test-hostile and test-matrix"

# The daemon killed at every operation, and the power cut: an hour on two cores. Without
# the race detector, which finds nothing in a daemon that is another program.
test-crash: build tools
	@echo "==> killing the daemon at every operation"
	ARTIFACT_SNAPSHOTTER_LONG=1 go test -count=1 -v -timeout 12h ./integration/crash
	ARTIFACT_SNAPSHOTTER_LONG=1 go test -count=1 -v -timeout 3h -run '^Test(ANodeSurvives|ContainerdIsGone)' ./integration

# The node and the unit tests on every file system: the table of docs/support.md. The
# disks are in memory, which takes some gigabytes of it.
test-filesystems: build tools
	@echo "==> running nodes and unit tests on every file system"
	ARTIFACT_SNAPSHOTTER_LONG=1 go test -count=1 -v -timeout 3h -run '^TestVolumesAreTheSameOnAnyFileSystem$$' ./integration

# Ten minutes of everything at once on a node, with the race detector in the daemon, too.
# ARTIFACT_SNAPSHOTTER_SOAK_SEED=2 is another order.
test-soak: build tools
	@echo "==> soaking a node for ten minutes"
	ARTIFACT_SNAPSHOTTER_LONG=1 go test -race -count=1 -v -timeout 60m -run '^TestNothingIsLostOrLeft' ./integration

# The hostile artifacts on every way to mount them, those of a million files included:
# most of an hour.
test-hostile: build tools
	@echo "==> mounting hostile artifacts in every way"
	ARTIFACT_SNAPSHOTTER_LONG=1 go test -count=1 -timeout 120m -v -run '^TestEveryArtifactGetsItsVerdict$$' ./integration/hostile

# A Kubernetes cluster of two machines, on which the chart is installed and upgraded.
test-cluster: build tools kubelet helm cluster-tools
	@echo "==> running a cluster"
	go test -count=1 -v -timeout 30m ./integration/cluster

# The chart, the examples, the dashboard and the alerts: files that Go does not see
# change, hence -count=1. Without cgo, as the kubelet,
# whose packages they share.
test-deploy: build helm
	@echo "==> testing what is in deploy/"
	cd deploy/verify && CGO_ENABLED=0 go test -count=1 ./...

# Without a node: seconds instead of minutes. Still needs root, for mounts.
test-unit: build
	go test -race $$(go list ./... | grep -v /integration)

# All that runs on a node, but for kubelet's pods.
test-node: build tools
	go test -race -timeout 60m -v -skip '^TestKubelet' $$(go list ./integration/... | grep -v /integration/cluster)
	$(tell_crio)

# All that runs on a node, on every supported version of containerd: the table of
# docs/support.md.
test-matrix: build tools containerd-older
	go run ./integration/matrix $(CONTAINERD_OLDER:%=$(TOOLS)-%) $(TOOLS)

# What differs between kernels, on those of Debian in virtual machines: the table of
# docs/support.md. Without a KVM that can boot them it takes some times longer.
test-kernels: build tools packages-kernels
	go run ./integration/kernels

bench: build tools kubelet
	@echo "==> running the benchmarks (docs/benchmarks.md says what they mean)"
	go run ./integration/bench

# What a plugin of NRI costs a container, on containerd and on CRI-O if there is one.
bench-nri: build tools
	go run ./integration/bench -run create

# Some hours, and 42 GiB in TMPDIR.
bench-peers: build tools
	@echo "==> comparing with the alternatives (docs/benchmarks.md says how)"
	go run ./integration/peers -out docs/peers

# Every parser of what an artifact says; FUZZTIME=10m for a thorough search. With a time,
# Go before 1.27 now and then fails when it is over (golang/go#75804): "context deadline
# exceeded", and no input. So it is a number of tries.
FUZZTIME ?= 20000x
FUZZ     := artifact:FuzzRead artifact:FuzzIdentify artifact:FuzzMayHaveConfig artifact:FuzzUnambiguous artifact:FuzzFileMetadata artifact:FuzzCleanPath \
            unpack:FuzzIndex unpack:FuzzInflate unpack:FuzzIDMap blobs:FuzzPath \
            store:FuzzName store:FuzzArrival snapshot:FuzzKey nri:FuzzMatch
fuzz:
	@set -e; for f in $(FUZZ); do \
		echo "==> $$f for $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$${f#*:}$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 50x ./$${f%%:*}; \
	done

# The modules of this repository that have code: what only one test needs is no dependency of
# the main module.
MODULES := . deploy/image deploy/verify integration/crash/recorder
ACTIONLINT := v1.7.12
lint: packages
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt-ed:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go run github.com/rhysd/actionlint/cmd/actionlint@$(ACTIONLINT)
	@echo "==> golangci-lint $(GOLANGCI_LINT) (built the first time)"
	@set -e; for module in $(MODULES); do \
		echo "==> linting the module in $$module"; \
		(cd $$module && CGO_ENABLED=0 go vet ./... && \
		CGO_ENABLED=0 go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT) run --allow-serial-runners ./...); \
	done

clean:
	rm -rf bin $(TOOLS) $(TOOLS)-*
