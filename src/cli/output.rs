//! What goes to stdout and stderr.
//!
//! A reader that goes away (`vb-ublk list | head -1`) is no error and no panic.

use std::fmt::Write as _;
use std::io::{self, BufWriter, StdoutLock, Write};

use serde_json::Value;

use crate::error::{Context, Result};
use crate::units::human_bytes;

/// Prints text to stdout as it is.
///
/// # Errors
/// When it cannot be written, but for a reader that has gone.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context(|| "writing to stdout"),
    }
}

/// Text for stdout that may be long: it is not kept whole.
pub(super) struct Long {
    out: BufWriter<StdoutLock<'static>>,
    gone: bool,
}

impl Long {
    pub(super) fn new() -> Self {
        Self { out: BufWriter::with_capacity(64 << 10, io::stdout().lock()), gone: false }
    }

    /// Whether nobody reads it any more.
    pub(super) const fn is_gone(&self) -> bool {
        self.gone
    }

    /// # Errors
    /// As for [`print`].
    pub(super) fn put(&mut self, text: std::fmt::Arguments<'_>) -> Result<()> {
        let done = if self.gone { Ok(()) } else { self.out.write_fmt(text) };
        self.told(done)
    }

    /// # Errors
    /// As for [`print`].
    pub(super) fn end(mut self) -> Result<()> {
        let done = if self.gone { Ok(()) } else { self.out.flush() };
        self.told(done)
    }

    fn told(&mut self, done: io::Result<()>) -> Result<()> {
        match done {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(())
            }
            done => done.context(|| "writing to stdout"),
        }
    }
}

/// Prints a JSON value.
///
/// # Errors
/// As for [`print`].
pub(super) fn print_json(v: &Value) -> Result<()> {
    print(&format!("{v:#}\n"))
}

/// Text without line breaks and control characters.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_control()).map(str::trim).filter(|w| !w.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// Rows under a header, in columns that are as wide as they have to be.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (w, cell) in widths.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (cell, w) in cells.zip(&widths) {
            let _ = write!(row, "{cell:w$}  ");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// An object as indented `key: value` lines, for people: `size_bytes` becomes `size: 10 GiB (10737418240)`.
pub(super) fn fields(v: &Value) -> String {
    let mut text = String::new();
    nest(&mut text, v, 0);
    text
}

fn nest(text: &mut String, v: &Value, depth: usize) {
    let Value::Object(map) = v else {
        let _ = writeln!(text, "{:1$}{2}", "", depth * 2, leaf("", v));
        return;
    };
    for (key, v) in map {
        let name = key.strip_suffix("_bytes").or_else(|| key.strip_suffix("_secs")).unwrap_or(key).replace('_', " ");
        let _ = write!(text, "{:1$}{name}:", "", depth * 2);
        match v {
            Value::Object(map) if !map.is_empty() => {
                text.push('\n');
                nest(text, v, depth + 1);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                text.push('\n');
                for item in items {
                    let _ = writeln!(text, "{:1$}-", "", depth * 2 + 2);
                    nest(text, item, depth + 2);
                }
            }
            v => {
                let _ = writeln!(text, " {}", leaf(key, v));
            }
        }
    }
}

fn leaf(key: &str, v: &Value) -> String {
    match v {
        Value::Null => "-".to_owned(),
        Value::Bool(b) => if *b { "yes" } else { "no" }.to_owned(),
        Value::String(s) => one_line(s),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(|i| leaf("", i)).collect::<Vec<_>>().join(", "),
        Value::Object(_) => "none".to_owned(),
        Value::Number(n) => match (n.as_u64(), n.as_f64()) {
            (Some(bytes), _) if key.ends_with("_bytes") && bytes >= 1024 => format!("{} ({bytes})", human_bytes(bytes)),
            (Some(bytes), _) if key.ends_with("_bytes") => human_bytes(bytes),
            (_, Some(secs)) if key.ends_with("_secs") && !key.ends_with("unix_secs") => duration(secs),
            _ => n.to_string(),
        },
    }
}

/// Seconds as people read them: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 0 min`, `5 d 3 h`.
pub(super) fn duration(secs: f64) -> String {
    if !secs.is_finite() || secs < 0.0 {
        return "-".to_owned();
    }
    let s = secs as u64;
    match s {
        0..10 if secs.fract() != 0.0 => format!("{secs:.1} s"),
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn people_read_fields() {
        let v = json!({
            "size_bytes": 10_u64 << 30, "used_bytes": 5, "read_only": false, "failure": null, "oldest_pending_secs": 65.2,
            "log": { "used_bytes": 4096 }, "names": ["a", "b"], "epochs": [{ "epoch": 1 }], "empty": {}, "no_names": [], "bad": "a\nb",
        });
        let text = fields(&v);
        for line in [
            "size: 10 GiB (10737418240)\n",
            "used: 5 B\n",
            "read only: no\n",
            "failure: -\n",
            "oldest pending: 1 min 5 s\n",
            "log:\n  used: 4 KiB (4096)\n",
            "names: a, b\n",
            "epochs:\n  -\n    epoch: 1\n",
            "empty: none\n",
            "no names: none\n",
            "bad: a b\n",
        ] {
            assert!(text.contains(line), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["/dev/ublkb0".into(), "é".into(), "x".into()], vec!["-".into(), "long".into(), String::new()]];
        assert_eq!(
            table(&["DEVICE", "VOL", "Z"], &rows),
            "DEVICE       VOL   Z\n/dev/ublkb0  é     x\n-            long\n"
        );
    }

    #[test]
    fn durations() {
        for (secs, text) in
            [(0.0, "0 s"), (0.44, "0.4 s"), (12.9, "12 s"), (7205.0, "2 h 0 min"), (443_000.0, "5 d 3 h")]
        {
            assert_eq!(duration(secs), text);
        }
        assert_eq!(duration(f64::NAN), "-");
    }
}
