//! `vb-ublk nbd` from the outside, by a raw client: the protocol to the letter, and the volume's promises through it.

#[path = "../nbd_support/mod.rs"]
mod nbd_support;
#[path = "../support_rng/mod.rs"]
mod support_rng;

mod commands;
mod durability;
mod handshake;
mod lifecycle;
mod load;
mod metrics;
mod orders;
mod sharing;
