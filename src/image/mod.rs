//! Disk images: what a volume is imported from.

mod source;
pub mod viperblock;

pub use source::ImageSource;
