//! Manifests, with anything in them.
#![no_main]

use sha2::{Digest, Sha256};
use vb_ublk::manifest::Manifest;

const FIELD: &str = "\"checksum\": \"";

/// The text with its checksum put right, where it has one.
fn sealed(text: &str) -> Option<String> {
    let begin = text.rfind(FIELD)? + FIELD.len();
    let end = begin + text[begin..].find('"')?;
    let plain = [&text[..begin], &text[end..]].concat();
    let sum: String = Sha256::digest(&plain).iter().map(|b| format!("{b:02x}")).collect();
    Some([&text[..begin], &sum, &text[end..]].concat())
}

fn read(bytes: &[u8]) {
    if let Ok(m) = Manifest::decode(bytes) {
        let again = m.encode().expect("what was read can be written");
        assert_eq!(Manifest::decode(&again).expect("and read again"), m);
        let _ = m.owner(m.last_chunk());
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    if let Some(text) = std::str::from_utf8(bytes).ok().and_then(sealed) {
        read(text.as_bytes());
    }
});
