// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

const (
	dashboardFile = "../grafana/artifact-snapshotter.json"
	alertsFile    = "../prometheus/artifact-snapshotter.rules.yaml"
	daemon        = "../../bin/artifact-snapshotter" // `make build` makes it
)

// byPrometheus are the labels that a series has from who scrapes it.
var byPrometheus = []string{"job", "instance"}

// exported are the names of the series that a real daemon exports, with their labels.
// A histogram is its three kinds of series.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	dir, err := os.MkdirTemp("", "as-") // short, because a socket is in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "metrics.sock")
	config := filepath.Join(dir, "config.toml")
	blobs := filepath.Join(dir, "content", "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, fmt.Appendf(nil, "metrics_address = 'unix://%s'\n", socket), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(daemon, "serve", "--config", config, "--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "state"),
		"--content-root", filepath.Join(dir, "content"), "--containerd-address", filepath.Join(dir, "none.sock"))
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the daemon: %v: %s", err, log.String())
		}
	}()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	// The daemon serves metrics a moment before it watches containerd, and exports
	// containerd_connected only from then on.
	var families map[string]*dto.MetricFamily
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		families, err = scrape(&client)
		if err == nil && families["artifact_snapshotter_containerd_connected"] != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the daemon exports no artifact_snapshotter_containerd_connected: %v", err)
		}
	}
	series := map[string][]string{}
	for name, family := range families {
		labels := map[string]bool{}
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
			}
		}
		own := slices.Sorted(maps.Keys(labels))
		if family.GetMetric()[0].Histogram == nil {
			series[name] = own
			continue
		}
		series[name+"_count"], series[name+"_sum"] = own, own
		series[name+"_bucket"] = append(slices.Clone(own), "le")
	}
	return series
}

func scrape(client *http.Client) (map[string]*dto.MetricFamily, error) {
	answer, err := client.Get("http://daemon/metrics")
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text := expfmt.NewTextParser(model.UTF8Validation)
	return text.TextToMetricFamilies(answer.Body)
}

// wrong says what in the query is not of the series; "" if there is nothing. What
// Grafana replaces is replaced before.
func wrong(query string, series map[string][]string) string {
	query = strings.NewReplacer("$__rate_interval", "5m", "$__interval", "1m").Replace(query)
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
	if err != nil {
		return err.Error()
	}
	var bad []string
	used := map[string]bool{}
	var grouping []string
	parser.Inspect(expr, func(node parser.Node, _ []parser.Node) error {
		switch n := node.(type) {
		case *parser.VectorSelector:
			labels, ok := series[n.Name]
			if !ok {
				bad = append(bad, "no metric is called "+n.Name)
			}
			for _, l := range append(slices.Clone(labels), byPrometheus...) {
				used[l] = true
			}
			for _, m := range n.LabelMatchers {
				if m.Name != model.MetricNameLabel && !slices.Contains(append(labels, byPrometheus...), m.Name) {
					bad = append(bad, fmt.Sprintf("%s has no label %s", n.Name, m.Name))
				}
			}
		case *parser.AggregateExpr:
			grouping = append(grouping, n.Grouping...)
		case *parser.BinaryExpr:
			if n.VectorMatching != nil {
				grouping = append(grouping, n.VectorMatching.MatchingLabels...)
			}
		}
		return nil
	})
	for _, l := range grouping {
		if !used[l] {
			bad = append(bad, "no metric in it has the label "+l)
		}
	}
	return strings.Join(bad, "; ")
}

func TestDashboardIsOneThatGrafanaLoads(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	plugins.RegisterDefaultPlugins()
	var d dashboard.Dashboard
	if err := d.UnmarshalJSONStrict(text); err != nil {
		t.Errorf("by Grafana's own types: %v", err)
	}
	if err := d.Validate(); err != nil {
		t.Errorf("by Grafana's own rules: %v", err)
	}
	if err := d.UnmarshalJSONStrict([]byte(strings.Replace(string(text), `"panels"`, `"panel"`, 1))); err == nil {
		t.Error("a key that is misspelt is taken")
	}
}

// panel is what is looked at of a panel of the dashboard.
type panel struct {
	ID         int    `json:"id"`
	Type       string `json:"type"`
	Title      string `json:"title"`
	Datasource struct {
		UID string `json:"uid"`
	} `json:"datasource"`
	GridPos     struct{ X, Y, W, H int } `json:"gridPos"`
	FieldConfig struct {
		Defaults struct {
			Unit string `json:"unit"`
		} `json:"defaults"`
	} `json:"fieldConfig"`
	Targets []struct {
		Expr         string `json:"expr"`
		LegendFormat string `json:"legendFormat"`
	} `json:"targets"`
}

func TestDashboardAsksForWhatTheDaemonExports(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels     []panel `json:"panels"`
		Templating struct {
			List []struct {
				Name, Type, Definition string
			} `json:"list"`
		} `json:"templating"`
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	series := exported(t)
	shown := map[string]bool{}
	ids := map[int]bool{}
	for i, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the ID %d", p.ID)
		}
		ids[p.ID] = true
		for _, other := range d.Panels[:i] {
			a, b := p.GridPos, other.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("%q is on top of %q", p.Title, other.Title)
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Title == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %d, %q, lacks a title, a unit, a query or the data source that was chosen", p.ID, p.Title)
		}
		for _, target := range p.Targets {
			if bad := wrong(target.Expr, series); bad != "" {
				t.Errorf("%q: %s: %s", p.Title, target.Expr, bad)
			}
			for _, label := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				if !strings.Contains(target.Expr, label[1]) {
					t.Errorf("%q: the query has no label %q for the legend", p.Title, label[1])
				}
			}
			for name := range series {
				if strings.Contains(target.Expr, name+"{") {
					shown[strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count")] = true
				}
			}
		}
	}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		asked := regexp.MustCompile(`^label_values\((.+), (\w+)\)$`).FindStringSubmatch(v.Definition)
		if asked == nil {
			t.Errorf("the variable %s: %s", v.Name, v.Definition)
		} else if bad := wrong(asked[1], series); bad != "" || !slices.Contains(byPrometheus, asked[2]) {
			t.Errorf("the variable %s: %s: %s", v.Name, v.Definition, bad)
		}
	}
	for name := range series {
		name = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"), "_sum")
		if strings.HasPrefix(name, "artifact_snapshotter_") && !shown[name] {
			t.Errorf("%s is nowhere on the dashboard", name)
		}
	}
}

func TestAlertsAskForWhatTheDaemonExports(t *testing.T) {
	text, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	groups, errs := rulefmt.Parse(text, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	for _, err := range errs {
		t.Error(err)
	}
	series := exported(t)
	rules := 0
	for _, group := range groups.Groups {
		for _, rule := range group.Rules {
			rules++
			if bad := wrong(rule.Expr, series); bad != "" {
				t.Errorf("%s: %s", rule.Alert, bad)
			}
			if rule.Labels["severity"] == "" || rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("%s has no severity, summary or description", rule.Alert)
			}
		}
	}
	if rules == 0 {
		t.Error("there are no alerts")
	}
}

// The checks above can fail.
func TestAQueryThatIsWrongIsFound(t *testing.T) {
	series := map[string][]string{"good_total": {"reason"}, "good_seconds_bucket": {"le"}}
	for query, want := range map[string]string{
		`sum by (reason) (rate(good_total{job="a",reason="b"}[$__rate_interval]))`: "",
		`histogram_quantile(0.9, sum by (le) (rate(good_seconds_bucket[1m])))`:     "",
		`rate(renamed_total[1m])`:             "no metric is called renamed_total",
		`good_total{cause="b"}`:               "good_total has no label cause",
		`sum by (cause) (good_total)`:         "no metric in it has the label cause",
		`good_total and on (node) good_total`: "no metric in it has the label node",
		`sum(good_total`:                      "parse error",
	} {
		got := wrong(query, series)
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
}
