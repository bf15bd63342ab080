"""The page around the report: style for light and dark, the hover script, and a policy that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5b6576;--line:#dfe3ea;--ground:#f6f7f9;--card:#fff;--grid:#e9ecf1;
--good:#14804a;--bad:#c22f36;--warn:#9a6200;--mark:#7d889b;
--c0:#2f6fde;--c1:#d9660c;--c2:#168a5b;--c3:#b23a8f;--c4:#7a5af0;--c5:#a07400;--c6:#0a8ea0;--c7:#c0392b}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--line:#303846;--ground:#12151b;--card:#1a1f28;
--grid:#272e3a;--good:#4cc98a;--bad:#ff7b7b;--warn:#e0ae4d;--mark:#8a95a8;
--c0:#6ea3ff;--c1:#ff9d54;--c2:#4fd09a;--c3:#ee86cf;--c4:#ab97ff;--c5:#e0bd4a;--c6:#4fc6d8;--c7:#ff8f85}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 12px}
h3{font-size:15px;margin:18px 0 8px}
p{margin:6px 0}
small,.soft{color:var(--soft);font-weight:400}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:baseline}
.badge{font-size:13px;font-weight:600;padding:2px 10px;border-radius:99px;border:1px solid currentColor;
white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:12px}
.tile b{display:block;font-size:20px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile>span{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));background:var(--card);
border:1px solid var(--line);border-radius:10px;overflow:hidden;margin-top:12px}
.facts div{box-shadow:0 0 0 .5px var(--line);padding:9px 14px}
.facts b{display:block;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:14px}
figure.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 12px 6px;
overflow-x:auto;display:flex;flex-direction:column}
figure.chart svg{width:100%;min-width:440px;height:auto;display:block;margin-top:auto}
figcaption{font-weight:600}
.none{color:var(--soft);padding:40px 0;text-align:center}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0;padding:0;font-size:13px;
color:var(--soft)}
.legend li{overflow-wrap:anywhere}
.legend li::before{content:"";display:inline-block;width:16px;margin-right:6px;vertical-align:3px;
border-top:3px solid var(--c)}
.legend .dashed::before{border-top-style:dashed}.legend .faint::before{opacity:.4}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
svg text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
svg .label{font-size:10.5px;fill:var(--ink)}
.grid{stroke:var(--grid)}.axis{stroke:var(--line)}
.mark{stroke:var(--mark);stroke-dasharray:3 3}
.guide{stroke:var(--soft)}.guide[hidden]{display:none}
.cross{stroke:var(--bad);stroke-width:2;fill:none}
polyline.s{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
polyline.faint{stroke-width:1;opacity:.38}
polyline.dashed{stroke-dasharray:6 4}
circle.s{fill:var(--c)}circle.faint{opacity:.5}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right;white-space:nowrap}
td.w{white-space:normal;overflow-wrap:anywhere;min-width:14em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,"DejaVu Sans Mono",monospace;margin:0}
.sample mark{background:color-mix(in srgb,var(--c0) 18%,transparent);color:inherit}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft)}
details>*:not(summary){margin-top:8px}
#tip{position:fixed;pointer-events:none;background:var(--card);border:1px solid var(--mark);border-radius:6px;
padding:4px 9px;font-size:12.5px;white-space:pre;font-variant-numeric:tabular-nums;z-index:2}
@media print{body{background:#fff}.card,figure.chart{break-inside:avoid}}
"""

# Reads the values back from the drawn points, so that no number stands in the page twice.
SCRIPT = """
(function(){
var tip=document.createElement('div');tip.id='tip';tip.hidden=true;document.body.appendChild(tip);
function show(n){return Math.abs(n)>=1e4?Math.round(n).toLocaleString('en'):String(+n.toPrecision(4))}
document.querySelectorAll('figure.chart svg').forEach(function(svg){
var X=svg.dataset.x.split(' ').map(Number),Y=svg.dataset.y.split(' ').map(Number),log='log' in svg.dataset;
var guide=svg.querySelector('.guide'),series={};
svg.querySelectorAll('polyline.s,circle.s').forEach(function(e){
var list=series[e.dataset.name]=series[e.dataset.name]||[];
if(e.points)for(var i=0;i<e.points.numberOfItems;i++){var p=e.points.getItem(i);list.push([p.x,p.y])}
else list.push([+e.getAttribute('cx'),+e.getAttribute('cy')])});
function value(y){var s=(240-y)/194;return log?Y[0]*Math.pow(Y[1]/Y[0],s):Y[0]+s*(Y[1]-Y[0])}
svg.addEventListener('pointermove',function(ev){
var box=svg.getBoundingClientRect(),x=(ev.clientX-box.left)*560/box.width,best=null;
Object.keys(series).forEach(function(k){series[k].forEach(function(p){
if(best===null||Math.abs(p[0]-x)<Math.abs(best-x))best=p[0]})});
if(best===null)return;
var step=Math.round(X[0]+(best-58)/488*(X[1]-X[0])),lines=['step '+(X[1]>X[0]?step:X[0]).toLocaleString('en')];
Object.keys(series).forEach(function(k){var near=null;series[k].forEach(function(p){
if(near===null||Math.abs(p[0]-best)<Math.abs(near[0]-best))near=p});
if(near&&Math.abs(near[0]-best)<2)lines.push(k+'  '+show(value(near[1])))});
guide.removeAttribute('hidden');guide.setAttribute('x1',best);guide.setAttribute('x2',best);
tip.textContent=lines.join('\\n');tip.hidden=false;
tip.style.left=Math.min(ev.clientX+14,innerWidth-tip.offsetWidth-8)+'px';
tip.style.top=Math.max(ev.clientY-tip.offsetHeight-10,4)+'px'});
svg.addEventListener('pointerleave',function(){tip.hidden=true;guide.setAttribute('hidden','')})})})();
"""


def page(title: str, body: str) -> str:
    """A complete HTML document; `body` is HTML, `title` is text. It can load and run nothing but its own parts."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
