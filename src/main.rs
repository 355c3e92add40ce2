//! The `tale` command.

fn main() -> std::process::ExitCode {
    tale::cli::run()
}
