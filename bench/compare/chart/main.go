// Command chart draws the results of a comparison as SVG.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// results is the part of compare.json that is drawn.
type results struct {
	Date     string   `json:"date"`
	Subjects []string `json:"subjects"`
	Machine  struct {
		Kernel string `json:"kernel"`
		CPU    string `json:"cpu"`
		CPUs   int    `json:"cpus"`
	} `json:"machine"`
	Rows []row `json:"rows"`
}

type row struct {
	ID     string             `json:"id"`
	Title  string             `json:"title"`
	Unit   string             `json:"unit"`
	Lower  bool               `json:"lower_is_better"`
	Median map[string]float64 `json:"median"`
	Ratio  float64            `json:"ratio"`
}

const (
	ours     = "usernet"
	loopback = "loopback"
)

// Colours: usernet's bar tells whether it leads the peers or trails them.
var (
	leading  = color.RGBA{R: 0x1f, G: 0x77, B: 0xb4, A: 0xff}
	trailing = color.RGBA{R: 0xd6, G: 0x5f, B: 0x0e, A: 0xff}
	colours  = map[string]color.Color{
		ours:          leading,
		loopback:      color.Gray{Y: 0xcc},
		"slirp4netns": color.Gray{Y: 0x90},
		"pasta":       color.Gray{Y: 0x60},
	}
	white = color.Gray{Y: 0xff}
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: chart RESULTS.json DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintf(os.Stderr, "chart: %v\n", err)
		os.Exit(1)
	}
}

func run(file, dir string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read results: %w", err)
	}
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
	plotter.DefaultFont = plot.DefaultFont
	var r results
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("decode results: %w", err)
	}
	if err := drawBars(r, filepath.Join(dir, "compare.svg")); err != nil {
		return err
	}
	err = drawFlows(r, filepath.Join(dir, "flows.svg"))
	if errors.Is(err, errNothing) {
		return nil
	}
	return err
}

var errNothing = errors.New("draw: nothing was measured")

// drawBars draws one small panel per figure.
func drawBars(r results, path string) error {
	var panels []*plot.Plot
	for _, row := range r.Rows {
		if strings.HasPrefix(row.ID, "flows-") || strings.HasPrefix(row.ID, "retransmits-") || strings.HasPrefix(row.ID, "work-") {
			continue
		}
		p, err := panel(row, r.Subjects)
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	if len(panels) == 0 {
		return errNothing
	}
	caption := fmt.Sprintf("medians, %s, %d × %s, Linux %s. Orange: usernet trails the better peer.", r.Date, r.Machine.CPUs, r.Machine.CPU, r.Machine.Kernel)
	return save(path, panels, 5, 165, 120, caption)
}

// panel is a bar chart of one figure.
func panel(row row, subjects []string) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = row.Title + "\n" + note(row)
	p.Title.TextStyle.Font.Size = vg.Points(7.5)
	p.Title.Padding = vg.Points(2)
	var names []string
	var tops plotter.XYs
	var values []string
	for _, name := range append([]string{loopback}, subjects...) {
		v, ok := row.Median[name]
		if !ok || !finite(v) {
			continue
		}
		bar, err := plotter.NewBarChart(plotter.Values{v}, vg.Points(24))
		if err != nil {
			return nil, fmt.Errorf("draw %s: %w", row.ID, err)
		}
		bar.XMin = float64(len(names))
		bar.LineStyle.Width = 0
		bar.Color = barColour(row, name)
		p.Add(bar)
		tops = append(tops, plotter.XY{X: bar.XMin, Y: v})
		values = append(values, number(v))
		names = append(names, shortName(name))
	}
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: tops, Labels: values})
	if err != nil {
		return nil, fmt.Errorf("draw %s: %w", row.ID, err)
	}
	for i := range labels.TextStyle {
		labels.TextStyle[i].Font.Size = vg.Points(7)
		labels.TextStyle[i].XAlign = text.XCenter
	}
	labels.Offset = vg.Point{Y: vg.Points(1)}
	p.Add(labels)
	p.NominalX(names...)
	p.X.Tick.Label.Font.Size = vg.Points(7)
	p.X.LineStyle.Width = 0
	p.X.Tick.LineStyle.Width = 0
	p.X.Min, p.X.Max = -0.6, 3.6
	p.HideY()
	p.Y.Min = 0
	p.Y.Max *= 1.18 // room for the numbers
	return p, nil
}

func note(row row) string {
	parts := []string{row.Unit}
	if row.Lower {
		parts = append(parts, "less is better")
	}
	return strings.Trim(strings.Join(parts, ", "), ", ")
}

func barColour(row row, name string) color.Color {
	behind := row.Ratio != 0 && (row.Lower && row.Ratio > 1 || !row.Lower && row.Ratio < 1)
	if name == ours && behind {
		return trailing
	}
	return colours[name]
}

func shortName(name string) string {
	if name == "slirp4netns" {
		return "slirp"
	}
	return name
}

// drawFlows draws throughput over the number of flows, up and down.
func drawFlows(r results, path string) error {
	var panels []*plot.Plot
	for _, way := range []string{"up", "down"} {
		p := plot.New()
		p.Title.Text = "bulk TCP " + way
		p.Title.TextStyle.Font.Size = vg.Points(10)
		p.X.Label.Text, p.Y.Label.Text = "flows", "Gbit/s"
		p.X.Scale = plot.LogScale{}
		p.X.Tick.Marker = plot.ConstantTicks(flowTicks(r.Rows, way))
		p.Y.Min = 0
		p.Legend.Top = true
		p.Legend.TextStyle.Font.Size = vg.Points(8)
		p.Add(plotter.NewGrid())
		lines := 0
		for _, name := range append([]string{loopback}, r.Subjects...) {
			points := flowPoints(r.Rows, way, name)
			if len(points) == 0 {
				continue
			}
			line, dots, err := plotter.NewLinePoints(points)
			if err != nil {
				return fmt.Errorf("draw flows: %w", err)
			}
			line.Color, dots.Color, dots.Shape = colours[name], colours[name], draw.CircleGlyph{}
			line.Width = vg.Points(1.5)
			p.Add(line, dots)
			p.Legend.Add(name, line, dots)
			lines++
		}
		if lines > 0 {
			p.Y.Max *= 1.35 // room for the legend
			panels = append(panels, p)
		}
	}
	if len(panels) == 0 {
		return errNothing
	}
	caption := fmt.Sprintf("medians, %s, %d × %s, Linux %s", r.Date, r.Machine.CPUs, r.Machine.CPU, r.Machine.Kernel)
	return save(path, panels, 2, 330, 230, caption)
}

// flowPoints are the medians of flows-WAY-N of one subject.
func flowPoints(rows []row, way, name string) plotter.XYs {
	var points plotter.XYs
	for _, row := range rows {
		n, err := strconv.Atoi(strings.TrimPrefix(row.ID, "flows-"+way+"-"))
		v, ok := row.Median[name]
		if err == nil && ok && finite(v) {
			points = append(points, plotter.XY{X: float64(n), Y: v})
		}
	}
	slices.SortFunc(points, func(a, b plotter.XY) int { return int(a.X - b.X) })
	return points
}

func flowTicks(rows []row, way string) []plot.Tick {
	var ticks []plot.Tick
	for _, row := range rows {
		n, err := strconv.Atoi(strings.TrimPrefix(row.ID, "flows-"+way+"-"))
		if err == nil {
			ticks = append(ticks, plot.Tick{Value: float64(n), Label: strconv.Itoa(n)})
		}
	}
	return ticks
}

// save draws panels in a grid with a caption below.
func save(path string, panels []*plot.Plot, columns int, width, height float64, caption string) error {
	columns = min(columns, len(panels))
	rows := (len(panels) + columns - 1) / columns
	const foot = 16
	canvas := vgsvg.New(vg.Points(float64(columns)*width), vg.Points(float64(rows)*height+foot))
	all := draw.New(canvas)
	all.SetColor(white)
	all.Fill(all.Rectangle.Path())
	style := plot.New().Title.TextStyle
	style.Font.Size = vg.Points(8)
	style.XAlign, style.YAlign = text.XLeft, text.YBottom
	all.FillText(style, vg.Point{X: all.Min.X + vg.Points(4), Y: all.Min.Y + vg.Points(4)}, caption)
	grid := draw.Crop(all, 0, 0, vg.Points(foot), 0)
	tiles := draw.Tiles{Rows: rows, Cols: columns, PadX: vg.Points(8), PadY: vg.Points(8), PadTop: vg.Points(4), PadLeft: vg.Points(4), PadRight: vg.Points(4)}
	for i, p := range panels {
		p.Draw(tiles.At(grid, i%columns, i/columns))
	}
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return fmt.Errorf("draw chart: %w", err)
	}
	// A browser seldom has the font that the text was measured with.
	out := bytes.ReplaceAll(svg.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	if err := os.WriteFile(path, out, 0o644); err != nil {
		return fmt.Errorf("write chart: %w", err)
	}
	return nil
}

// number shows three digits, thousands as k.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 10_000:
		return strconv.FormatFloat(v/1000, 'f', 0, 64) + "k"
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}

func finite(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }
