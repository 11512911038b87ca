//! A client that says anything as requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|said: &[u8]| vb_ublk::frontend::nbd::fuzzing::session(said));
