// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/urfave/cli/v3"
)

// repository is the root of the source.
const repository = "../.."

// budgets are how many words each document may have: a document with one job is read, a long
// one is not. Words are what has a letter or a digit, also in code and tables.
var budgets = map[string]int{
	"README.md": 900, "CONTRIBUTING.md": 700,
	"docs/packing.md": 900, "docs/install.md": 1600, "docs/configuration.md": 1400,
	"docs/kubernetes.md": 2300, "docs/cli.md": 1500, "docs/operations.md": 2200,
	"docs/troubleshooting.md": 2500, "docs/nri.md": 2000, "docs/csi.md": 1200, "docs/native-unpack.md": 900,
	"docs/support.md": 1200, "docs/security.md": 1200, "docs/design.md": 2600,
	"docs/reliability.md": 1200, "docs/benchmarks.md": 1600, "docs/glossary.md": 200, "docs/releases.md": 250,
}

// document reads a file of the repository.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repository, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// documents are all that a reader is sent to.
func documents(t *testing.T) (names []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "integration/*.md", "integration/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(repository, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			rel, err := filepath.Rel(repository, name)
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, rel)
		}
	}
	return names
}

func TestDocumentsStayWithinTheirWords(t *testing.T) {
	total := 0
	for name, budget := range budgets {
		words := 0
		for word := range strings.FieldsSeq(document(t, name)) {
			if strings.ContainsFunc(word, func(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) }) {
				words++
			}
		}
		total += words
		if words > budget {
			t.Errorf("%s has %d words, and may have %d: say it shorter, or where it belongs", name, words, budget)
		}
	}
	if total > 25000 {
		t.Errorf("the documents have %d words, and may have 25,000", total)
	}
	for _, name := range documents(t) {
		if _, ok := budgets[name]; strings.HasPrefix(name, "docs/") && !ok {
			t.Errorf("%s has no budget", name)
		}
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
)

// anchors are those that GitHub gives the headings of a document.
func anchors(text string) (all []string) {
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		title := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(m[1], "$1")
		all = append(all, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, title))
	}
	return all
}

func TestLinksAndAnchorsOfDocumentsExist(t *testing.T) {
	for _, name := range documents(t) {
		text := document(t, name)
		for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
			target := m[1]
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			file, anchor, hasAnchor := strings.Cut(target, "#")
			path := name
			if file != "" {
				path = filepath.Join(filepath.Dir(name), file)
			}
			if _, err := os.Stat(filepath.Join(repository, path)); err != nil {
				t.Errorf("%s links to %s: %v", name, target, err)
				continue
			}
			if hasAnchor && !slices.Contains(anchors(document(t, path)), anchor) {
				t.Errorf("%s links to %s, and %s has no such heading", name, target, path)
			}
		}
	}
}

// mentioned is a call of the program in a document.
var mentioned = regexp.MustCompile("(?:^|[`$ /])artifact-snapshotter ((?:[a-z-]+ ?)+(?:[^`\n]*))")

func TestCommandsInDocumentsExist(t *testing.T) {
	root := command()
	calls := 0
	for _, name := range documents(t) {
		if strings.HasPrefix(name, "integration/") || name == "CHANGELOG.md" {
			continue
		}
		for line := range strings.Lines(document(t, name)) {
			if strings.Contains(line, "helm ") || strings.Contains(line, "systemctl") || strings.Contains(line, "journalctl") {
				continue // there it is the name of a release or of a unit
			}
			for _, m := range mentioned.FindAllStringSubmatch(line, -1) {
				words := strings.Fields(m[1])
				if strings.HasPrefix(words[0], "-") {
					continue // a flag before the command
				}
				sub := subcommand(root, words[0])
				if sub == nil {
					if strings.HasPrefix(strings.TrimSpace(line), "$ ") || strings.Contains(line, "`artifact-snapshotter "+words[0]) {
						t.Errorf("%s calls %q, which is no command", name, words[0])
					}
					continue
				}
				calls++
				for _, word := range words[1:] {
					word, _, _ = strings.Cut(strings.Trim(word, "`.,;:()[]"), "=")
					if nested := subcommand(sub, word); nested != nil {
						sub = nested
					}
					flag, ok := strings.CutPrefix(word, "--")
					if ok && flag != "help" && !hasFlag(root, sub, flag) {
						t.Errorf("%s calls %s with --%s, which it does not have", name, sub.FullName(), flag)
					}
				}
			}
		}
	}
	if calls < 40 {
		t.Errorf("only %d calls were found: the search is wrong", calls)
	}
}

// subcommand returns the command of that name.
func subcommand(parent *cli.Command, name string) *cli.Command {
	for _, sub := range parent.Commands {
		if slices.Contains(sub.Names(), name) {
			return sub
		}
	}
	return nil
}

// hasFlag reports whether the command, or the program before it, takes the flag.
func hasFlag(root, command *cli.Command, name string) bool {
	return slices.ContainsFunc(slices.Concat(root.Flags, command.Flags), func(f cli.Flag) bool { return slices.Contains(f.Names(), name) })
}
