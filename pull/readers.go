// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// Who has read which manifest is kept beside containerd's metadata, whose bucket is v1, so that
// pods come back after a reboot without their registry. kubelet keeps the same of images
// (KubeletEnsureSecretPulledImages). No name in the bucket tells a secret without the key, which
// only root can read, too.
var (
	bucketReaders = []byte("readers")
	bucketKey     = []byte("key")
)

func (p *Puller) openReaders(tx *bbolt.Tx) error {
	_, err := tx.CreateBucketIfNotExists(bucketReaders)
	if err != nil {
		return err
	}
	keys, err := tx.CreateBucketIfNotExists(bucketKey)
	if err != nil {
		return err
	}
	if p.key = bytes.Clone(keys.Get(bucketKey)); p.key == nil {
		p.key = make([]byte, sha256.Size)
		_, _ = rand.Read(p.key) // it never fails (crypto/rand)
		err = keys.Put(bucketKey, p.key)
	}
	return err
}

// reader is the name in the bucket of who asks for what.
func (p *Puller) reader(ref Reference, cred Credential, manifest digest.Digest) []byte {
	mac := hmac.New(sha256.New, p.key)
	_, _ = fmt.Fprintf(mac, "%q %q %q %q", ref.Name(), cred.Username, cred.Secret, manifest)
	return mac.Sum(nil)
}

// permit remembers that these credentials have read the manifest in this repository. If that
// fails, the registry is asked again.
func (p *Puller) permit(ctx context.Context, ref Reference, cred Credential, manifest digest.Digest) {
	if p.permitted(Request{Reference: ref, Credentials: []Credential{cred}}, manifest) {
		return
	}
	if err := p.bolt.Update(func(tx *bbolt.Tx) error {
		readers := tx.Bucket(bucketReaders)
		if readers.Stats().KeyN >= maxReaders {
			if err := tx.DeleteBucket(bucketReaders); err != nil {
				return err
			}
			var err error
			if readers, err = tx.CreateBucket(bucketReaders); err != nil {
				return err
			}
		}
		return readers.Put(p.reader(ref, cred, manifest), []byte{1})
	}); err != nil {
		log.G(ctx).WithError(err).Warn("cannot note that a registry has allowed these credentials to read the artifact")
	}
}

// permitted reports whether one of the request's credentials has read the manifest.
func (p *Puller) permitted(r Request, manifest digest.Digest) (permitted bool) {
	_ = p.bolt.View(func(tx *bbolt.Tx) error { // it fails only if the database is closed
		for _, cred := range r.Credentials {
			permitted = permitted || tx.Bucket(bucketReaders).Get(p.reader(r.Reference, cred, manifest)) != nil
		}
		return nil
	})
	return permitted
}
