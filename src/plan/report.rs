//! The report of a run for people, in Markdown, made from its record.

use super::record::{History, Outcome, StepState};
use crate::control::time;

/// Text that cannot break out of a table or a line.
fn plain(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => safe.push(' '),
            '|' | '`' | '<' | '*' | '_' | '[' | '\\' => safe.extend(['\\', c]),
            c if c.is_control() => {}
            c => safe.push(c),
        }
    }
    safe
}

fn seconds(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.3} s"))
}

/// One word for how the run stands.
pub fn outcome(history: &History) -> &'static str {
    match history.ended {
        Some((_, Outcome::Ok)) => "ok",
        Some((_, Outcome::Failed)) => "failed",
        Some((_, Outcome::Abandoned)) => "abandoned",
        None => "unfinished",
    }
}

/// The whole report.
pub fn markdown(history: &History) -> String {
    let begun = &history.begun;
    let mut text = format!(
        "# Plan {}, {}: {}\n\n",
        begun.plan,
        begun.mode,
        outcome(history)
    );
    let mut fact = |name: &str, value: &str| text += &format!("* **{name}**: {value}\n");
    fact("Run", &begun.run);
    fact("Site", begun.site.as_str());
    if let Some(to) = &begun.to {
        fact("To", to.as_str());
    }
    fact("Who", &plain(&begun.by));
    fact("Why", &plain(begun.reason.as_deref().unwrap_or("not said")));
    fact("Began", &time::format(history.began_at));
    for (at, by, reason) in &history.resumed {
        let why = reason
            .as_deref()
            .map_or(String::new(), |why| format!(": {why}"));
        fact(
            "Resumed",
            &format!("{} by {}", time::format(*at), plain(&format!("{by}{why}"))),
        );
    }
    if let Some((at, _)) = history.ended {
        let took = at.since(history.began_at).as_secs_f64();
        fact("Ended", &format!("{}, after {took:.3} s", time::format(at)));
    }
    if begun.fenced_by_operator {
        fact("Fence", "the operator's word");
    }
    for network in &begun.networks {
        fact("Network", &plain(network));
    }
    fact("Program", &format!("lifeboat {}", plain(&begun.version)));
    let guests = history.steps.iter().filter_map(|step| {
        let (_, guest) = step.step.split_once("/guest/")?;
        Some((guest, step, step.figures.as_ref()?))
    });
    let rows: Vec<String> = guests
        .map(|(guest, step, figures)| {
            let point = figures
                .point
                .map_or("-".to_owned(), |point| format!("#{point}"));
            format!(
                "| {guest} | {} | {point} | {} | {} | {} |\n",
                step.state.as_str(),
                seconds(figures.loss_seconds),
                seconds(figures.rto_seconds),
                seconds(figures.downtime_seconds),
            )
        })
        .collect();
    if !rows.is_empty() {
        text += "\n## Guests\n\n| Guest | State | Point | Loss (RPO) | RTO | Downtime |\n|---|---|---|---|---|---|\n";
        text += &rows.concat();
    }
    text += "\n## Steps\n\n| Step | State | Time | What |\n|---|---|---|---|\n";
    for step in &history.steps {
        let state = match step.state {
            StepState::Failed => "**FAILED**",
            state => state.as_str(),
        };
        let detail = plain(step.detail.as_deref().unwrap_or(""));
        text += &format!(
            "| {} | {state} | {:.3} s | {detail} |\n",
            plain(&step.step),
            step.seconds
        );
    }
    text += &format!(
        "\n## Record\n\nVerified; the blake3 of its last line is `{}`.\n",
        history.head
    );
    text += "\n## The plan\n\n";
    text.extend(begun.text.lines().map(|line| format!("    {line}\n")));
    text
}
