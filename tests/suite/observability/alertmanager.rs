//! The example for Alertmanager does what it says: who is told, and what is not said twice.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::prometheus::get;
use super::{dashboards, tool};
use crate::harness::{free_port, wait};

const PACKAGE: &str = "prometheus-alertmanager";

#[test]
fn amtool_finds_that_each_severity_reaches_its_receiver() {
    for (severity, receiver) in [
        ("critical", "pager"),
        ("warning", "tickets"),
        // Nothing of ours has it, and somebody is told all the same.
        ("none", "tickets"),
    ] {
        let name = "amtool_finds_that_each_severity_reaches_its_receiver";
        let Some(mut amtool) = tool(name, "amtool", PACKAGE) else {
            return;
        };
        let file = dashboards().join("alertmanager-example.yml");
        amtool.args(["config", "routes", "test"]);
        amtool.arg(format!("--config.file={}", file.display()));
        amtool.arg(format!("--verify.receivers={receiver}"));
        amtool.arg(format!("severity={severity}"));
        amtool.arg("alertname=LifeboatRpoBreached");
        super::content(amtool);
    }
}

/// Debian's server looks for its templates where it is installed. One that was only unpacked is
/// started where that place shows what was unpacked.
fn at_home(test: &str) -> Option<Command> {
    const SERVER: &str = "prometheus-alertmanager";
    let plain = tool(test, SERVER, PACKAGE)?;
    let templates = "prometheus/alertmanager/default.tmpl";
    if Path::new("/usr/share").join(templates).exists() {
        return Some(plain);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let unpacked = std::env::split_paths(&path).find_map(|bin| {
        let share = bin.parent()?.join("share");
        (bin.join(SERVER).exists() && share.join(templates).exists()).then_some(share)
    });
    let share = unpacked.unwrap_or_default().display().to_string();
    let within = |script: &str| {
        let mut command = Command::new("unshare");
        let mount = format!("mount -t overlay none -o lowerdir={share}:/usr/share /usr/share");
        let script = format!("{mount} && {script}");
        command.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"]);
        command
    };
    let tried = within("true").output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        println!("skipped: {test}: {SERVER} finds no templates, and cannot be shown any here");
        return None;
    }
    Some(within(&format!("exec {SERVER} \"$@\"")))
}

/// A server with the example. Dropping it ends it.
struct Alertmanager {
    server: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Alertmanager {
    fn start(mut command: Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let file = dashboards().join("alertmanager-example.yml");
        let server = command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.path={}", directory.path().display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            // No cluster: nothing but loopback is listened on.
            .arg("--cluster.listen-address=")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let started = Self {
            server,
            port,
            directory,
        };
        let ready = || get(port, "/-/ready").map(drop);
        wait("Alertmanager is ready", ready);
        started
    }

    /// Tells it of alerts, by their labels.
    fn tell(&self, alerts: &[Value]) {
        let alerts: Vec<Value> = alerts.iter().map(|a| json!({"labels": a})).collect();
        let body = Value::from(alerts).to_string();
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "POST /api/v2/alerts HTTP/1.0\r\nHost: localhost\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.split(' ').nth(1), Some("200"), "{answer}");
    }

    /// Labels of the alerts that are in this state, once all are known and looked at.
    fn in_state(&self, wanted: &str, count: usize) -> Vec<Value> {
        wait("every alert is looked at", || {
            let text = get(self.port, "/api/v2/alerts")?;
            let alerts: Vec<Value> = serde_json::from_str(&text).unwrap();
            let state = |alert: &Value| alert["status"]["state"].as_str().map(str::to_owned);
            let looked_at = |alert: &Value| state(alert).as_deref() != Some("unprocessed");
            (alerts.len() == count && alerts.iter().all(looked_at)).then(|| {
                let found = alerts
                    .iter()
                    .filter(|a| state(a).as_deref() == Some(wanted));
                found.map(|alert| alert["labels"].clone()).collect()
            })
        })
    }
}

impl Drop for Alertmanager {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.server.kill();
        let _ = self.server.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.path().join("log"));
            println!("--- Alertmanager\n{}", log.unwrap_or_default());
        }
    }
}

/// What is told of a guest and of an instance.
fn alert(name: &str, severity: &str, of: &str) -> Value {
    json!({
        "alertname": name, "severity": severity, "guest": of,
        "instance": format!("instance of {of}"), "cert": "site",
    })
}

#[test]
fn alertmanager_says_no_consequence_beside_its_cause() {
    let name = "alertmanager_says_no_consequence_beside_its_cause";
    let Some(command) = at_home(name) else { return };
    let server = Alertmanager::start(command);
    // Cause and consequences of one guest or instance each.
    let pairs = [
        ("silent", "LifeboatSiteSilent", "LifeboatRpoBreached"),
        ("silent", "LifeboatSiteSilent", "LifeboatReplicationStalled"),
        ("late", "LifeboatRpoBreached", "LifeboatRpoBudgetBurnFast"),
        ("late", "LifeboatRpoBreached", "LifeboatRpoBudgetBurnSlow"),
        ("late", "LifeboatRpoBreached", "LifeboatResyncOften"),
        ("late", "LifeboatRpoBreached", "LifeboatCheckpointsFailing"),
        ("full", "LifeboatJournalFull", "LifeboatJournalFillingUp"),
        ("full", "LifeboatJournalFull", "LifeboatJournalSlow"),
        ("split", "LifeboatSplitBrain", "LifeboatFenceRejections"),
        // Nobody's guest: the rule asks for no equal label.
        ("dead", "LifeboatDaemonDown", "LifeboatLinkDown"),
    ];
    let mut told = Vec::new();
    let mut silenced = Vec::new();
    for (of, cause, consequence) in pairs {
        for (list, name) in [(&mut told, cause), (&mut silenced, consequence)] {
            let alert = alert(name, "critical", of);
            if !list.contains(&alert) {
                list.push(alert);
            }
        }
    }
    // Another guest and another instance have none of these causes.
    for (_, _, consequence) in pairs.iter().filter(|(of, _, _)| *of != "dead") {
        // One each: some of these are a cause of others.
        let another = format!("another with {consequence}");
        told.push(alert(consequence, "critical", &another));
    }
    // Errors of a journal may be damage, whatever else is true.
    told.push(alert("LifeboatJournalErrors", "critical", "full"));
    // A certificate of a day is not also told as one of a week; another one is.
    told.push(alert("LifeboatCertificateExpiring", "critical", "old"));
    silenced.push(alert("LifeboatCertificateExpiring", "warning", "old"));
    told.push(alert("LifeboatCertificateExpiring", "warning", "another"));

    server.tell(&[told.clone(), silenced.clone()].concat());
    let count = told.len() + silenced.len();
    let sorted = |mut alerts: Vec<Value>| {
        alerts.sort_by_key(Value::to_string);
        alerts
    };
    // Alertmanager looks at inhibition when it groups, and again at each question.
    wait("what follows from a cause is silent", || {
        let suppressed = sorted(server.in_state("suppressed", count));
        (suppressed == sorted(silenced.clone())).then_some(())
    });
    assert_eq!(sorted(server.in_state("active", count)), sorted(told));
}
