//! A client that says anything before its first request.
#![no_main]

libfuzzer_sys::fuzz_target!(|said: &[u8]| vb_ublk::frontend::nbd::fuzzing::handshake(said));
