//! What the demo shows: lines while it runs, one verdict at its end.

use serde::Serialize;

/// Where the demo's words go, and with which label.
#[derive(Debug, Clone, Copy)]
pub(super) struct Voice {
    /// The last line of standard output is the verdict as JSON; all others go to standard error.
    pub json: bool,
    /// Every line says that nothing of it is real.
    pub simulated: bool,
}

impl Voice {
    /// One line for people, or several: each with its label.
    pub(super) fn say(self, text: impl std::fmt::Display) {
        let label = if self.simulated { "simulated  " } else { "" };
        for line in text.to_string().lines() {
            if self.json {
                eprintln!("{label}{line}");
            } else {
                println!("{label}{line}");
            }
        }
    }

    /// The verdict.
    pub(super) fn conclude(self, verdict: &Verdict) {
        if self.json {
            let json = serde_json::to_string(verdict).expect("a verdict has no keys but strings");
            println!("{json}");
        } else {
            self.say(verdict.to_text());
        }
    }
}

/// Passed or failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Continuity is proven.
    Pass,
    /// It is not, or the demo did not get that far.
    Fail,
}

/// The document `lifeboat.demo/v1`. What was not reached is `null`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Verdict {
    /// Name and version of the document.
    pub schema: &'static str,
    /// Passed or failed.
    pub result: Outcome,
    /// Number of the recovery point that was resumed.
    pub epochs: Option<u64>,
    /// Work that was lost: from the point's capture to the kill.
    pub rpo_seconds: Option<f64>,
    /// From the failover command to the first line that the resumed guest printed.
    pub rto_seconds: Option<f64>,
    /// Median pause of the guest by a checkpoint.
    pub pause_p50_seconds: Option<f64>,
    /// Wrong pages in the image of the point, and those that the guest found.
    pub memory_mismatches: Option<u64>,
    /// Wrong blocks in the image of the point, and those that the guest found.
    pub disk_mismatches: Option<u64>,
    /// The guest was not a real one.
    pub simulated: bool,
    /// What ran the instructions of a guest of QEMU: `kvm` or `tcg`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<&'static str>,
    /// How checkpoints of a guest of QEMU were taken, and why so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl Verdict {
    /// Nothing is known yet.
    pub(super) fn new(simulated: bool) -> Verdict {
        Verdict {
            schema: "lifeboat.demo/v1",
            result: Outcome::Fail,
            epochs: None,
            rpo_seconds: None,
            rto_seconds: None,
            pause_p50_seconds: None,
            memory_mismatches: None,
            disk_mismatches: None,
            simulated,
            accelerator: None,
            checkpoints: None,
            problems: Vec::new(),
        }
    }

    /// Judges what was found: pass if all was reached, no byte is wrong and there is no problem.
    pub(super) fn judge(&mut self) {
        let clean = self.memory_mismatches == Some(0) && self.disk_mismatches == Some(0);
        let reached = self.rpo_seconds.is_some() && self.rto_seconds.is_some();
        self.result = if clean && reached && self.problems.is_empty() {
            Outcome::Pass
        } else {
            Outcome::Fail
        };
    }

    fn to_text(&self) -> String {
        let seconds = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.3} s"));
        let count = |value: Option<u64>| value.map_or("-".to_owned(), |v| v.to_string());
        let mut lines = vec![format!(
            "{}   RPO {}   RTO {}   pause p50 {}   mismatches: memory {}, disk {}",
            match self.result {
                Outcome::Pass => "PASS",
                Outcome::Fail => "FAIL",
            },
            seconds(self.rpo_seconds),
            seconds(self.rto_seconds),
            self.pause_p50_seconds
                .map_or("-".to_owned(), |v| format!("{:.2} ms", v * 1e3)),
            count(self.memory_mismatches),
            count(self.disk_mismatches),
        )];
        lines.extend(self.problems.iter().map(|problem| format!("  {problem}")));
        lines.join("\n")
    }
}

/// `12.3 MiB`.
pub(super) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_as_promised() {
        let mut verdict = Verdict {
            epochs: Some(7),
            rpo_seconds: Some(0.25),
            rto_seconds: Some(0.5),
            pause_p50_seconds: Some(0.001),
            memory_mismatches: Some(0),
            disk_mismatches: Some(0),
            ..Verdict::new(false)
        };
        verdict.judge();
        assert_eq!(
            serde_json::to_string(&verdict).unwrap(),
            "{\"schema\":\"lifeboat.demo/v1\",\"result\":\"pass\",\"epochs\":7,\"rpo_seconds\":0.25,\
             \"rto_seconds\":0.5,\"pause_p50_seconds\":0.001,\"memory_mismatches\":0,\
             \"disk_mismatches\":0,\"simulated\":false}"
        );
    }

    #[test]
    fn nothing_passes_that_was_not_reached_or_is_wrong() {
        let good = Verdict {
            rpo_seconds: Some(0.25),
            rto_seconds: Some(0.5),
            memory_mismatches: Some(0),
            disk_mismatches: Some(0),
            ..Verdict::new(false)
        };
        let spoil: [fn(&mut Verdict); 6] = [
            |v| v.memory_mismatches = Some(1),
            |v| v.memory_mismatches = None,
            |v| v.disk_mismatches = Some(1),
            |v| v.rpo_seconds = None,
            |v| v.rto_seconds = None,
            |v| v.problems.push("the daemon ended".to_owned()),
        ];
        let result = |mut verdict: Verdict| {
            verdict.judge();
            verdict.result
        };
        assert_eq!(result(good.clone()), Outcome::Pass);
        for spoil in spoil {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert_eq!(result(bad), Outcome::Fail);
        }
    }
}
