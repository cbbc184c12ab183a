"""The style sheet of the report: light, dark and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f4f5f7; --edge: #dcdfe4; --text: #1d2126; --muted: #626b76;
  --c0: #2563eb; --c1: #d9660b; --good: #14803c; --doubtful: #a85a00; --bad: #b91c1c; --none: #52606d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --card: #1e2227; --edge: #363c44; --text: #e6e9ed; --muted: #98a2ad;
    --c0: #6ea2ff; --c1: #ff9d4d; --good: #4cc27a; --doubtful: #f0a63c; --bad: #ff7b72; --none: #98a2ad;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 90rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 3rem) 4rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; max-width: 100ch; }
.muted, figcaption, .strip th small { color: var(--muted); }
.verdict { margin: 1rem 0; padding: .9rem 1.2rem; background: var(--card); border-left: .45rem solid var(--none); }
.verdict > p:first-child { font-size: 1.25rem; font-weight: 600; margin: 0; color: var(--none); }
.verdict.good { border-color: var(--good); } .verdict.good > p:first-child { color: var(--good); }
.verdict.doubtful { border-color: var(--doubtful); } .verdict.doubtful > p:first-child { color: var(--doubtful); }
.verdict.bad { border-color: var(--bad); } .verdict.bad > p:first-child { color: var(--bad); }
.verdict ul { margin: .4rem 0; padding-left: 1.2rem; max-width: 90ch; }
.licence.restricted { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .15rem .9rem .15rem 0; font-weight: normal; }
table.facts th { color: var(--muted); white-space: nowrap; } table.facts td { overflow-wrap: anywhere; }
table.facts thead th { border-bottom: 1px solid var(--edge); }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.strip { table-layout: fixed; width: 100%; }
.attention { min-width: 44rem; }
.strip th, .strip td { padding: 2px; }
.strip th:first-child { width: 9.5rem; } .attention th:first-child { width: 6rem; }
.strip th[scope=row] { padding-right: .8rem; vertical-align: middle; line-height: 1.3; }
.strip th[scope=col] { font-size: .85rem; color: var(--muted); vertical-align: bottom; text-align: center; }
.strip th small { display: block; }
.strip th[scope=row] img { height: .55rem; width: 100%; margin: .2rem 0 0; }
.strip img { display: block; width: 100%; height: auto; border-radius: 2px; }
img.exact { image-rendering: pixelated; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem .8rem; background: var(--card); border-radius: 4px; }
figcaption { font-size: .87rem; margin-bottom: .3rem; } figcaption b { color: var(--text); }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.grid { stroke: var(--edge); stroke-width: 1; }
.mark { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 4 3; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.curve.c0 { stroke: var(--c0); } .curve.c1 { stroke: var(--c1); }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); }
.direction { stroke: var(--c1); stroke-width: 1.4; }
.start { fill: var(--good); stroke: var(--page); stroke-width: 1.5; }
.end { fill: none; stroke: var(--bad); stroke-width: 2; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin: 0 .25em 0 .7em; }
.key.c0 { background: var(--c0); } .key.c1 { background: var(--c1); } .key.begin { background: var(--good); }
.key.finish { border: 2px solid var(--bad); }
table.bars { width: 100%; max-width: 44rem; }
td.bars { width: 100%; vertical-align: middle; } .bar { height: .8rem; min-width: 1px; background: var(--c0); }
table td.value { text-align: right; white-space: nowrap; overflow-wrap: normal; }
summary { cursor: pointer; color: var(--muted); margin: .5rem 0; }
@media print {
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .scroll { overflow: visible; } .strip { min-width: 0 !important; } .strip th:first-child { width: 6rem; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
}
@media print and (prefers-color-scheme: dark) {
  :root {
    --page: #ffffff; --card: #f4f5f7; --edge: #dcdfe4; --text: #1d2126; --muted: #626b76;
    --c0: #2563eb; --c1: #d9660b; --good: #14803c; --doubtful: #a85a00; --bad: #b91c1c; --none: #52606d;
  }
}
"""
