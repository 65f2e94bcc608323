"""The style of the page: readable on a phone and on paper, light and dark."""

CSS = """
:root {
  --back: #ffffff; --text: #1c2024; --soft: #5f6871; --line: #dfe3e8; --card: #f6f8fa;
  --c0: #4b5563; --c1: #d97706; --c2: #2563eb; --c3: #059669; --c4: #9333ea; --c5: #dc2626;
  --c6: #0891b2; --c7: #db2777; --c8: #65a30d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171a; --text: #e6e8ea; --soft: #9aa4ad; --line: #2f353b; --card: #1d2125;
    --c0: #9ca3af; --c1: #f59e0b; --c2: #60a5fa; --c3: #34d399; --c4: #c084fc; --c5: #f87171;
    --c6: #22d3ee; --c7: #f472b6; --c8: #a3e635;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; margin: .4em 0; }
h2 { font-size: 1.2rem; margin: 2em 0 .5em; padding-top: .6em; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4em 0 .4em; overflow-wrap: anywhere; }
p { max-width: 46em; margin: .5em 0; }
.soft, figcaption span { color: var(--soft); }
.lead { font-size: 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: .2em 1.1em; margin: .8em 0; }
a { color: var(--c2); text-decoration: none; }
a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35em .8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .named th:last-child, .named td:last-child,
.left th, .left td { text-align: left; }
@media (max-width: 600px) { th, td { padding: .3em .45em; } }
.keys .value { display: inline-block; white-space: normal; overflow-wrap: anywhere; max-width: 24em; }
.keys td:first-child .value { min-width: 12em; }
.up { color: var(--c3); } .down { color: var(--c5); }
.swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .45em; border-radius: 2px;
  background: var(--color);
}
.swatch.dashed {
  height: 0; width: 1.1em; vertical-align: .25em; border-top: 3px dashed var(--color); background: none;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px 28px; }
.chart { margin: .8em 0; max-width: 580px; }
.chart figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3em; }
.chart svg { width: 100%; height: auto; display: block; }
.chart text { font-size: 13px; fill: var(--soft); }
.chart .grid { stroke: var(--line); fill: none; }
.chart .line { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 6 4; }
.chart circle { fill: var(--color); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .1em 1.2em; margin: .3em 0 0; padding: 0;
  font-size: .9rem;
}
.dots { max-width: 720px; margin: .8em 0; }
.row { display: grid; grid-template-columns: minmax(5em, 24%) 1fr; gap: 14px; align-items: center; margin: 3px 0; }
.row > span { font-size: .9rem; text-align: right; overflow-wrap: anywhere; line-height: 1.2; }
.track { position: relative; height: 20px; margin-right: 16px; border-bottom: 1px solid var(--line); }
.track b { position: absolute; top: 9px; height: 3px; background: var(--line); }
.track i {
  position: absolute; top: 4px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%;
  background: var(--color); border: 1px solid var(--back);
}
.scale .track { border: 0; }
.scale .track i {
  background: none; border: 0; font-style: normal; font-size: .75rem; line-height: 1; color: var(--soft);
  width: 3em; margin-left: -1.5em; text-align: center;
}
.panels {
  display: grid; max-width: calc(var(--count) * 310px); gap: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(46%, 175px), 1fr));
}
.panel { margin: 0; font-size: .85rem; }
.picture {
  width: 100%; height: auto; display: block; background-size: 100% 100%; background-color: var(--card);
  border-radius: 3px; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.picture rect, .picture polygon {
  fill: none; stroke: var(--mark); stroke-width: 2; vector-effect: non-scaling-stroke;
}
.picture polygon { fill: var(--mark); fill-opacity: .15; stroke-width: 1; }
.picture text {
  fill: var(--mark); stroke: #000; stroke-width: .22em; stroke-linejoin: round; paint-order: stroke;
  font-weight: 600;
}
.truth { --mark: #facc15; } .right { --mark: #4ade80; } .wrong { --mark: #f43f5e; } .missed { --mark: #facc15; }
.wrong rect { stroke-dasharray: 7 3; } .missed rect { stroke-dasharray: 2 4; }
.key {
  display: inline-block; width: 1.5em; height: .9em; margin: 0 .4em 0 0; vertical-align: -.1em;
  border: 2px solid var(--mark); background: #6b7280;
}
.key:not(:first-child) { margin-left: 1em; }
.key.wrong { border-style: dashed; } .key.missed { border-style: dotted; }
details { margin: .5em 0; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
summary { cursor: pointer; padding: .5em .8em; }
details > :not(summary) { margin-left: .8em; margin-right: .8em; }
pre { overflow: auto; max-height: 30em; font-size: .8rem; line-height: 1.4; margin: 0 0 .8em; }
pre.commands {
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: none; padding: .8em; border-radius: 6px;
  background: var(--card);
}
""" + "".join(f".c{number} {{ --color: var(--c{number}); }}\n" for number in range(9))
