# SPDX-License-Identifier: Apache-2.0
"""Looks of ``report.html``: light and dark by the reader's system, or by the button."""

_LIGHT = (
    "--bg:#fbfbfa;--card:#fff;--ink:#1d2126;--quiet:#5d6670;--rule:#dfe3e6;--ok:#1b7f4b;"
    "--c0:#2563a8;--c1:#d9822b;--c2:#3a9a5b;--c3:#c2434f;--c4:#7a5cb8;--c5:#8a6a4f;--c6:#c55a9d;--c7:#5f6b76;"
    "--c8:#2aa3a3;--c9:#a3a02a;--c10:#6b2d5c;--c11:#1f4e5f"
)
_DARK = (
    "--bg:#15181c;--card:#1d2126;--ink:#e7eaed;--quiet:#9aa4ae;--rule:#343b43;--ok:#5fd39a;"
    "--c0:#6aa9f0;--c1:#f0a95a;--c2:#6fcb8d;--c3:#f07a84;--c4:#b39af0;--c5:#c9a587;--c6:#f096cc;--c7:#a3adb7;"
    "--c8:#5fd6d6;--c9:#d9d65f;--c10:#d08bbd;--c11:#8fc1d4"
)
STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{{_DARK}}}}}"
    f":root[data-theme=dark]{{{_DARK}}}"
    "*{box-sizing:border-box}"
    "body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}"
    "main{max-width:1020px;margin:0 auto;padding:28px 20px 60px}"
    "h1{font-size:1.7rem;line-height:1.2;margin:0 0 20px;padding-right:90px}"
    "h2{font-size:1.35rem;margin:44px 0 4px;border-top:1px solid var(--rule);padding-top:24px}"
    "h3{font-size:1.05rem;margin:0 0 8px}h4{font-size:.9rem;margin:14px 0 0;color:var(--quiet);font-weight:600}"
    "figure{margin:18px 0;padding:18px;background:var(--card);border:1px solid var(--rule);border-radius:10px}"
    "figcaption,.quiet{color:var(--quiet);font-size:.87rem}figcaption{margin-top:8px}"
    ".note{font-size:.87rem;color:var(--quiet);border-left:3px solid var(--c1);padding-left:10px;margin:8px 0}"
    "svg{display:block;width:100%;height:auto;max-width:860px;overflow:visible}"
    ".tick{font-size:12px;fill:var(--quiet)}.grid{stroke:var(--rule)}.axis{stroke:var(--quiet)}"
    ".whisker,.mean{stroke:var(--ink);stroke-width:1.4;fill:none}.mean{stroke-width:2.2}"
    ".legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.87rem;margin:4px 0 8px}"
    ".key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}"
    "th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}"
    "th{color:var(--quiet);font-weight:600}td{white-space:nowrap}"
    "details{margin:12px 0}summary{cursor:pointer;color:var(--c0)}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px}"
    "article{border:1px solid var(--rule);border-radius:8px;padding:12px;font-size:.9rem;overflow-wrap:anywhere}"
    "article p{margin:4px 0}article b{color:var(--quiet);font-weight:600;margin-right:4px}"
    "audio{width:100%;height:36px}dl{margin:8px 0 0}dt{color:var(--quiet);font-size:.8rem}"
    "dd{margin:0 0 6px;white-space:pre-wrap}dd.same::after{content:' ✓';color:var(--ok)}"
    "#theme{position:absolute;top:24px;right:20px;font:inherit;font-size:.85rem;background:none;cursor:pointer;"
    "color:var(--quiet);border:1px solid var(--rule);border-radius:6px;padding:3px 10px}"
)
SCRIPT = (
    "const b=document.createElement('button');b.id='theme';b.type='button';b.textContent='light / dark';"
    "b.onclick=()=>{const d=document.documentElement,q=matchMedia('(prefers-color-scheme:dark)').matches;"
    "d.dataset.theme=(d.dataset.theme||(q?'dark':'light'))==='dark'?'light':'dark'};document.body.prepend(b);"
)
