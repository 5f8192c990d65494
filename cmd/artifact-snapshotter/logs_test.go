// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// levels are the methods that log a message.
var levels = map[string]bool{"Trace": true, "Debug": true, "Info": true, "Warn": true, "Error": true, "Fatal": true}

// What follows a message is in fields, so that a message can be searched for as it is.
var message = regexp.MustCompile(`^[a-z][^\n%]*[^.!?\s]$`)

// Log lines have one style: a constant message in lower case, without a period.
func TestLogMessagesHaveOneStyle(t *testing.T) {
	found := 0
	for _, dir := range []string{"artifact", "blobs", "client", "cmd", "daemon", "images", "internal", "nri", "plugin", "service", "snapshot", "store", "unpack"} {
		err := filepath.WalkDir(filepath.Join(repository, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			files := token.NewFileSet()
			file, err := parser.ParseFile(files, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				method, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || !isLogger(method.X) {
					return true
				}
				at := files.Position(call.Pos())
				if levels[strings.TrimSuffix(method.Sel.Name, "f")] && !levels[method.Sel.Name] {
					t.Errorf("%s: %s formats its message: use a field", at, method.Sel.Name)
				}
				if !levels[method.Sel.Name] || len(call.Args) == 0 {
					return true
				}
				found++
				text, ok := call.Args[0].(*ast.BasicLit)
				if !ok || len(call.Args) != 1 {
					t.Errorf("%s: the message is not one constant", at)
					return true
				}
				if said, err := strconv.Unquote(text.Value); err != nil || !message.MatchString(said) {
					t.Errorf("%s: %q does not begin in lower case, or ends with a period (%v)", at, said, err)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 40 {
		t.Errorf("only %d messages were found: the search is wrong", found)
	}
}

// isLogger reports whether x is log.G(ctx), log.L, a variable called logger, or one of these
// with fields.
func isLogger(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return x.Name == "logger"
	case *ast.SelectorExpr:
		of, ok := x.X.(*ast.Ident)
		return x.Sel.Name == "logger" || ok && of.Name == "log" && x.Sel.Name == "L"
	case *ast.CallExpr:
		method, ok := x.Fun.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		of, ok := method.X.(*ast.Ident)
		return ok && of.Name == "log" && method.Sel.Name == "G" || strings.HasPrefix(method.Sel.Name, "With") && isLogger(method.X) || method.Sel.Name == "logger"
	}
	return false
}
