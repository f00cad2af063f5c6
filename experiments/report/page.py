"""The frame of the report page: head, style, places for facts, links and body."""

from string import Template

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Generated adapters: report</title>
<style>
:root { --ink: #1d2530; --soft: #5b6470; --line: #dfe3e8; --ground: #f6f7f9; --good: #00664b;
  --bad: #a33f00; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.4rem; }
body { margin: 0; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, section { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 34px; padding-bottom: 18px; }
h1 { margin: 0 0 4px; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 5; background: #fffffff2;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
nav div { max-width: 1180px; margin: 0 auto; padding: 0 12px; overflow-x: auto;
  white-space: nowrap; }
nav a { display: inline-block; padding: 11px 12px; color: var(--ink); text-decoration: none;
  font-size: 0.92rem; }
nav a:hover, nav a:focus { color: #0072b2; text-decoration: underline; }
section { padding-top: 30px; padding-bottom: 12px; }
section + section { border-top: 1px solid var(--line); }
h2 { margin: 0 0 12px; font-size: 1.42rem; }
h3 { margin: 28px 0 8px; font-size: 1.06rem; }
p { max-width: 78ch; margin: 0 0 12px; }
.lead p { font-size: 1.06rem; }
small { display: block; color: var(--soft); font-size: 0.8em; font-weight: 400; line-height: 1.35; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 18px 0 6px; }
.tiles div { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.tiles b { display: block; font-size: 1.55rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 0.86rem; line-height: 1.3; display: block; }
.claims { list-style: none; padding: 0; margin: 12px 0 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); }
.claims li { background: #fff; border: 1px solid var(--line); border-left-width: 5px;
  border-radius: 8px; padding: 12px 16px; }
.claims p { margin: 4px 0 0; font-size: 0.92rem; color: var(--soft); }
.claims b { display: block; }
.verdict { font-size: 0.86rem; font-weight: 700; }
.claims .holds { border-left-color: var(--good); } .holds .verdict { color: var(--good); }
.claims .fails { border-left-color: var(--bad); } .fails .verdict { color: var(--bad); }
.claims .open { border-left-color: #98a0aa; } .open .verdict { color: var(--soft); }
.scroll { overflow: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  margin: 8px 0 16px; }
.tall { max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #eef1f4; text-align: right; vertical-align: bottom;
  font-weight: 600; white-space: nowrap; z-index: 1; }
th, td { padding: 8px 14px; }
td { border-top: 1px solid #edf0f3; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 13em; }
.settings td, .settings th, .pairs td:nth-child(2), .pairs th:nth-child(2) { text-align: left; }
.settings td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; width: 72%; }
.tasks small { display: inline; margin-left: 4px; }
.number { display: inline-block; min-width: 2.1em; color: var(--soft); }
.bar { display: block; width: 130px; height: 7px; margin: 5px 0 0 auto; background: #edf0f3;
  border-radius: 4px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.up { color: var(--good); } .down { color: var(--bad); }
figure { margin: 10px 0 18px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 14px 10px; min-width: 0; }
.figures { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
.figures figure { margin: 0; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
.three .plot svg { min-width: 300px; }
.figures + * { margin-top: 20px; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; min-width: 420px; max-width: 660px;
  margin: 0 auto; }
.wide .plot svg { min-width: 760px; max-width: 1120px; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 8px; max-width: 78ch; }
.missing { color: var(--soft); font-style: italic; }
details { margin: 0 0 18px; } summary { cursor: pointer; padding: 6px 0; color: #00598c; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: 0.9rem; }
code { font-size: 0.94em; }
@media (max-width: 640px) {
  header, section { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.5rem; } th, td { padding: 7px 9px; }
  td:first-child { min-width: 9.5em; }
  figure { padding: 10px; }
  .plot svg { min-width: 320px; }
  .settings td:nth-child(2) { width: auto; min-width: 9em; }
  .settings td:first-child { min-width: 11em; }
}
@media print { nav { display: none; } .tall { max-height: none; } }
</style>
</head>
<body>
<header>
<h1>Adapters generated from task descriptions</h1>
<p>$facts</p>
</header>
<nav><div>$links</div></nav>
$body</body>
</html>
"""
)
