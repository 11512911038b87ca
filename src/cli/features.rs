//! `features`: what the kernel's driver can do.

use serde_json::{Value, json};

use super::engine;
use super::output::{print, print_json, table};
use crate::error::Result;

pub(super) fn run(as_json: bool) -> Result<()> {
    let kernel = engine::driver()?;
    if as_json {
        let known: Vec<Value> = kernel
            .known()
            .map(|(f, has)| json!({ "name": f.name, "kernel": kernel.bits.map(|_| has), "used": f.used, "about": f.about }))
            .collect();
        return print_json(&json!({ "bits": kernel.bits, "features": known }));
    }
    let rows: Vec<_> = kernel
        .known()
        .map(|(f, has)| {
            let has = match (kernel.bits, has) {
                (None, _) => "?",
                (_, true) => "yes",
                (_, false) => "no",
            };
            vec![f.name.to_owned(), has.to_owned(), if f.used { "yes" } else { "-" }.to_owned(), f.about.to_owned()]
        })
        .collect();
    let mut text = table(&["FEATURE", "KERNEL", "USED", "WHAT IT IS"], &rows);
    match kernel.bits {
        None => text
            .push_str("this kernel cannot be asked for its features (before Linux 6.5); vb-ublk finds out by trying\n"),
        Some(_) => {
            let missing: Vec<_> = kernel.missing().map(|f| f.name).collect();
            if !missing.is_empty() {
                text.push_str(&format!("vb-ublk would use, but this kernel lacks: {}\n", missing.join(", ")));
            }
        }
    }
    print(&text)
}
