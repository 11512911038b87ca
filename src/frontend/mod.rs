//! Ways in: what serves a volume to the world. Frontends never import each other.

pub mod nbd;
pub mod ublk;
