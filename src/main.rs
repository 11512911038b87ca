//! Entry of the `vb-ublk` command.

fn main() -> std::process::ExitCode {
    vb_ublk::cli::main()
}
