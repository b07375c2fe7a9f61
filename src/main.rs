//! The `lifeboat` program: everything is in the library, so that tests can reach it.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(lifeboat::cli::main() as u8)
}
