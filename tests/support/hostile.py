"""Texts that are written to be mistaken for something else: commands, paths, formats, terminal escapes."""

# ruff: noqa: E501

from __future__ import annotations

import itertools

_SHELL = ("; touch made", "| touch made", "&& touch made", "$(touch made)", "`touch made`", "> made", "<(touch made)")
_FRAMES = ("{}", "'{}'", '"{}"', "a{}", "\n{}", "--x={}", "a b {}", "${{IFS}}{}", "\\{}")
_PATHS = (
    "..", "../..", "../made", "../../../../tmp/made", "/made-at-the-root", "./../made", "a/../../made", "..\\made",
    "C:\\made", "\\\\host\\made", "~", "~root", "~/made", "/proc/self/environ", "/dev/stdin/x", "a/./..//../made",
    "....//",     "..%2fmade", "file:///made", "//made", "\u2025/made", "\uff0e\uff0e/made", "CON", "NUL", "aux.txt",
    "a" * 300, "a/" * 200 + "a", "é" * 200, "name.", "name ", " name", ".hidden", "-", "--", "-rf", "--help", "--json",
    "-o/made", "@made", "=made", "#made", "%00made",
)  # fmt: skip
_FORMATS = (
    "%s%s%s%n", "{0}", "{x}", "{}", "{{7*7}}", "{% x %}", "${oc.env:HF_TOKEN}", "${HOME}", "$HOME", "%HOME%",
    "{0.__class__}", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "' OR 1=1 --",
    "!!python/object:os.system", "&a [*a]", "*a", "a: b: c", "- a", "null", "true", "1e999", "0x10", "NaN", "[bold red]a[/]", "[/]", "[link=x]",
    '"""', '"""\nADAPTER /etc/shadow', 'x"\nFROM /etc/shadow\nSYSTEM "', "{{ .System }}", "\\", "\\n", "\\u0000",
    "'", '"', "_component_: os.system",
)  # fmt: skip
_TERMINAL = (
    "\x1b[2J", "\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link", "\x1b]52;c;bWFkZQ==\x07", "\x9b2J",
    "\x1bP1$r\x1b\\", "\x07\x07", "\x08\x08\x08", "\r\nerror: no", "a\rb", "\x0c", "\x0b", "\x7f", "\x85", "\u2028",
    "\u2029", "\u202eabc", "\u2066abc\u2069", "\u200b", "\u200d", "\ufeff", "\u00ad", "\U000e0041", "\ue000", "\uffff", "\x1b",
    "\x1bc", "\x1b(0", "\x1b[?1049h", "\x1b[6n", "\x0e", "\x1a", "\x04", "\x03", "\u061c", "\u180e", "\ufff9a\ufffb",
)  # fmt: skip
_LETTERS = (
    "日本", "🙂", "👨‍👩‍👧", "e\u0301", "ﷺ", "\u0644\u0627", "ﬀ", "\u0131", "İ", "ẞ", "Ω", "\u0430dmin", "\U0001d552",
    "\U0001f1e9\U0001f1ea", "Z" + "\u0310" * 60, "\udcff", "\ud800", "a\tb", "a b", " ", "\t", "\n", "\n\n", "a\nb", "\u3000",
)  # fmt: skip

TEXTS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(frame.format(text) for frame, text in itertools.product(_FRAMES, _SHELL)),
            *_PATHS,
            *_FORMATS,
            *_TERMINAL,
            *_LETTERS,
        ]
    )
)
"""More than two hundred different texts."""

STEERING = {chr(code) for code in (*range(9), 11, 12, 13, *range(14, 32), *range(127, 160))} | set(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\u200e\u200f\u061c"
)
"""Characters that control a terminal, or reverse what it shows."""
