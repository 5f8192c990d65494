// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// dropIn is the file of its own, beside containerd's configuration file, that holds
// what containerd needs. To add tables to the configuration file would not do: TOML
// has no table twice, and one of an earlier version has other tables.
type dropIn struct {
	path     string
	exists   bool
	imported bool // by the configuration file
	// made is the outermost folder that was made for it, or will have to be; "" if none.
	made   string
	before map[string]any
	// tables are before and what is missing.
	tables map[string]any

	// What the configuration file itself says.
	main struct {
		exists  bool
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
	}
}

// findDropIn finds the place of the file: where main imports all that is there, or in
// conf.d beside main.
func findDropIn(main string) (d dropIn, err error) {
	if d.main.exists, err = readTOML(main, &d.main); err != nil {
		return d, err
	}
	d.path = filepath.Join(filepath.Dir(main), "conf.d", name+".toml")
	for _, pattern := range d.main.Imports {
		pattern = imported(main, pattern)
		path := filepath.Join(filepath.Dir(pattern), name+".toml")
		if matches, err := filepath.Match(pattern, path); pattern == path || err == nil && matches && !strings.Contains(path, "*") {
			d.path, d.imported = path, true
		}
	}
	if d.exists, err = readTOML(d.path, &d.before); err != nil {
		return d, err
	}
	if d.made, err = folderOf(d.path); err != nil {
		return d, err
	}
	if _, err = readTOML(d.path, &d.tables); err != nil {
		return d, err
	}
	if d.tables == nil {
		d.tables = map[string]any{}
	}
	if !d.exists {
		d.tables["version"] = int64(3) // which containerd 2.1 reads, too
	}
	return d, nil
}

// folderOf is the outermost folder that was made for the drop-in at path, or that will be
// if there is none.
func folderOf(path string) (string, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		made := ""
		for dir := filepath.Dir(path); !exists(dir); dir = filepath.Dir(dir) {
			made = dir
		}
		return made, nil
	}
	for line := range strings.Lines(string(text)) {
		if dir, ok := strings.CutPrefix(strings.TrimSpace(line), madeFolder); ok {
			return dir, err
		}
	}
	return "", err
}

// imported is the path or the pattern of an import in the file main, as containerd reads
// it (resolveImports in its config package).
func imported(main, pattern string) string {
	if filepath.IsAbs(pattern) {
		return filepath.Clean(pattern)
	}
	return filepath.Join(filepath.Dir(main), pattern)
}

// readTOML reads a file, if it is there.
func readTOML(path string, into any) (exists bool, err error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !fi.Mode().IsRegular() {
		return false, notRegular(path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	err = toml.Unmarshal(text, into)
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, _ := decode.Position()
		return false, fmt.Errorf("%s: line %d: %w", path, row, err)
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return true, nil
}

// set puts a value into the file.
func (d *dropIn) set(value any, keys ...string) {
	in := d.tables
	for _, key := range keys[:len(keys)-1] {
		in = table(in, key)
	}
	in[keys[len(keys)-1]] = value
}

// advice says what to write, for the gains.
func (d *dropIn) advice(main string, gains []string) (all []advice, err error) {
	const restart = ", and restart containerd"
	switch missing := !reflect.DeepEqual(d.before, d.tables); {
	case !missing && d.imported:
		return []advice{{
			Do:   fmt.Sprintf("look (containerd config dump) which file that is imported after %s says otherwise, and take that away%s", d.path, restart),
			Gain: strings.Join(gains, ", "),
		}}, nil
	case missing:
		var text strings.Builder
		if err := toml.NewEncoder(&text).SetIndentTables(true).Encode(d.tables); err != nil {
			return nil, err
		}
		do := "write this into " + d.path
		if d.exists {
			do += ", in place of what is there"
		}
		if d.imported { // or else that is the last thing to write
			do += restart
		}
		all = append(all, advice{Do: do, Gain: strings.Join(gains, ", "), Lines: text.String()})
	}
	if d.imported {
		return all, nil
	}
	imports := d.main.Imports
	imports = append(imports[:len(imports):len(imports)], filepath.Join(filepath.Dir(d.path), "*.toml"))
	quoted := make([]string, len(imports))
	for i, pattern := range imports {
		quoted[i] = fmt.Sprintf("%q", pattern)
	}
	add := advice{Do: "add this at the top of " + main + restart, Gain: "containerd reads " + d.path, Lines: fmt.Sprintf("imports = [%s]\n", strings.Join(quoted, ", "))}
	switch {
	case !d.main.exists:
		add.Do = "write this into " + main + restart
		add.Lines = "version = 3\n" + add.Lines
	case d.main.Imports != nil:
		add.Do = "write this in place of the imports in " + main + restart
	}
	return append(all, add), nil
}

// newer says that the configuration file imports the file, and is of an earlier version.
func (d *dropIn) newer() bool {
	version, _ := d.before["version"].(int64)
	return d.imported && version > int64(d.main.Version)
}

// migration advises to bring the configuration file to version 3 before it imports a
// file of that version: containerd before 2.3 migrates them as one. What is to be
// written after it depends on what comes out.
func (d *dropIn) migration(main string) advice {
	command := fmt.Sprintf("containerd --config %[1]s config migrate > %[1]s.new && mv %[1]s.new %[1]s", main)
	if d.newer() { // and so that command must not import it
		command = fmt.Sprintf("mv %[1]s %[1]s.off && %[2]s && mv %[1]s.off %[1]s", d.path, command)
	}
	return advice{
		Do:   fmt.Sprintf("run `%s`, restart containerd, and run doctor again", command),
		Gain: "containerd 2.1 and 2.2 read what the file says of CRI, which they do not if it is of version 2 and imports a newer one",
	}
}
