// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"time"

	"go.etcd.io/bbolt"
)

// CheckDatabase checks a bbolt database, as `bbolt check` does. Nothing may have it open
// for writing: it fails if the database is locked for more than a minute.
func CheckDatabase(path string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Minute})
	if err != nil {
		return err
	}
	return errors.Join(db.View(func(tx *bbolt.Tx) error {
		var errs []error
		for err := range tx.Check() {
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}), db.Close())
}
