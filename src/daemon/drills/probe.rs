//! What a clone says on its serial console, and what that proves.
//!
//! ```text
//!   any guest   "\n" ──▶ console ──▶ any byte                                    console ok
//!   demo guest           console ──▶ "step S resumed elsewhere"                  resumed ok
//!                                ──▶ "step S+n errors 0", n pages were checked   self_check ok
//! ```

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use crate::control::types::ProbeReport;
use crate::plan::probe::Lines;
use crate::vmm::spec::Boot;

/// Pages that the demo guest has to check, if it has so many.
const CHECKED_MAX: u64 = 1024;

/// What was heard, and when first.
pub(super) struct Answer {
    /// The first sign of life.
    pub first: Option<Instant>,
    /// One per question.
    pub probes: Vec<ProbeReport>,
}

/// Listens to the console of a clone that was just resumed.
pub(super) async fn ask(socket: &Path, boot: Option<&Boot>, within: Duration) -> Answer {
    let mut heard = Heard::new(boot);
    let silence = match timeout(within, listen(socket, &mut heard)).await {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => format!("its console: {error}"),
        Err(_) => format!("not within {} s", within.as_secs_f64()),
    };
    Answer {
        first: heard.first,
        probes: heard.judge(&silence),
    }
}

async fn listen(socket: &Path, heard: &mut Heard) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    if heard.check.is_none() {
        // A terminal that waits for a login or a command answers this.
        stream.write_all(b"\n").await?;
    }
    let mut buffer = [0; 4096];
    while !heard.enough() {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(io::Error::other("it ended"));
        }
        heard.first.get_or_insert_with(Instant::now);
        heard.hear(&buffer[..count]);
    }
    Ok(())
}

#[derive(Default)]
struct Heard {
    /// Pages that the demo guest has to check; `None`: another guest.
    check: Option<u64>,
    first: Option<Instant>,
    lines: Lines,
    resumed: Option<u64>,
    /// The newest report since: step and errors.
    report: Option<(u64, u64)>,
    trouble: Option<String>,
}

impl Heard {
    fn new(boot: Option<&Boot>) -> Self {
        let check = match boot {
            Some(Boot::Demo { working_set_pages }) => {
                Some(u64::from(*working_set_pages).min(CHECKED_MAX))
            }
            Some(Boot::Linux { .. }) | None => None,
        };
        Self {
            check,
            ..Self::default()
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let mut lines = std::mem::take(&mut self.lines);
        lines.hear(bytes, |line| self.understand(line));
        self.lines = lines;
    }

    fn understand(&mut self, line: &str) {
        let Some(text) = line.trim().strip_prefix("lifeboat-demo: ") else {
            return;
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["step", step, "resumed", "elsewhere,", ..] => self.resumed = step.parse().ok(),
            ["step", step, "errors", errors, ..] if self.resumed.is_some() => {
                self.report = step.parse().ok().zip(errors.parse().ok());
            }
            ["step", ..] | [_, "lanes", ..] => {}
            _ => self.trouble = Some(text.to_owned()),
        }
    }

    /// Pages that it checked since it was resumed.
    fn checked(&self) -> u64 {
        let (resumed, step) = (self.resumed, self.report.map(|(step, _)| step));
        step.zip(resumed)
            .map_or(0, |(step, resumed)| step.saturating_sub(resumed))
    }

    fn errors(&self) -> u64 {
        self.report.map_or(0, |(_, errors)| errors)
    }

    /// More would change nothing.
    fn enough(&self) -> bool {
        match self.check {
            None => self.first.is_some(),
            Some(pages) => self.trouble.is_some() || self.errors() > 0 || self.checked() >= pages,
        }
    }

    fn judge(&self, silence: &str) -> Vec<ProbeReport> {
        let probe = |name: &str, passed, good: String, bad: String| ProbeReport {
            name: name.to_owned(),
            passed,
            detail: if passed { good } else { bad },
        };
        let Some(pages) = self.check else {
            let (good, bad) = ("it spoke".to_owned(), format!("it said nothing: {silence}"));
            return vec![probe("console", self.first.is_some(), good, bad)];
        };
        let step = self.resumed.unwrap_or(0);
        let resumed = probe(
            "resumed",
            self.resumed.is_some(),
            format!("it noticed at step {step}"),
            format!("it did not say that it was resumed: {silence}"),
        );
        let (checked, errors) = (self.checked(), self.errors());
        let bad = match &self.trouble {
            Some(trouble) => trouble.clone(),
            None if errors > 0 => format!("{errors} errors in its memory and disks"),
            None => format!("only {checked} of {pages} pages checked: {silence}"),
        };
        let clean = self.trouble.is_none() && errors == 0 && checked >= pages;
        let check = probe(
            "self_check",
            clean,
            format!("{checked} pages, no errors"),
            bad,
        );
        vec![resumed, check]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str) -> (bool, Vec<(bool, String)>) {
        let boot = Boot::Demo {
            working_set_pages: 256,
        };
        let mut heard = Heard::new(Some(&boot));
        // As it comes, in odd pieces.
        text.as_bytes()
            .chunks(7)
            .for_each(|piece| heard.hear(piece));
        let probes = heard.judge("not within 1 s").into_iter();
        let probes = probes.map(|p| (p.passed, p.detail)).collect();
        (heard.enough(), probes)
    }

    #[test]
    fn the_demo_guest_has_to_notice_and_to_check_itself() {
        let resumed = "lifeboat-demo: step 1000 resumed elsewhere, gen 3\r\n";
        let said = |step: u64, errors: u64| {
            format!("lifeboat-demo: step {step} errors {errors} gen 3\r\n")
        };
        // Reports of before do not count, also not in time.
        let cases = [
            (String::new(), false, false, false),
            (said(5000, 0), false, false, false),
            (format!("{}{resumed}", said(900, 0)), false, true, false),
            (format!("{resumed}{}", said(1100, 0)), false, true, false),
            (format!("{resumed}{}", said(1256, 0)), true, true, true),
            (format!("{resumed}{}", said(1010, 2)), true, true, false),
            (
                "lifeboat-demo: cannot run: no disk\n".to_owned(),
                true,
                false,
                false,
            ),
            ("x".repeat(1 << 20), false, false, false),
        ];
        for (text, enough, noticed, clean) in cases {
            let (found, probes) = heard(&text);
            let passed: Vec<bool> = probes.iter().map(|(passed, _)| *passed).collect();
            let shown = text.get(..text.len().min(80));
            assert_eq!(
                (found, &passed[..]),
                (enough, &[noticed, clean][..]),
                "{shown:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_console_that_is_not_there_or_ends_fails_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("console.sock");
        let boot = Boot::Linux {
            kernel: "vmlinux".into(),
            initrd: None,
            cmdline: String::new(),
        };
        let within = Duration::from_secs(60);
        let answer = ask(&socket, Some(&boot), within).await;
        assert!(answer.first.is_none() && !answer.probes[0].passed);

        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let guest = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).await.unwrap();
            stream.write_all(b"login:").await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask(&socket, Some(&boot), within), guest);
        assert!(answer.first.is_some() && answer.probes[0].passed);
    }
}
