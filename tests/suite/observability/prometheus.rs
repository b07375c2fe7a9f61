//! Prometheus on loopback, scraping every second, with the shipped rules made impatient.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::rules_text;
use crate::harness::{free_port, wait};

/// See the module. Dropping it ends the server.
pub struct Prometheus {
    server: Child,
    port: u16,
    directory: tempfile::TempDir,
}

/// The shipped rules, which wait for nothing.
fn impatient() -> String {
    let lines = rules_text();
    let lines = lines.lines().filter_map(|line| {
        let indent = &line[..line.len() - line.trim_start().len()];
        match line.trim_start() {
            key if key.starts_with("keep_firing_for: ") => None,
            key if key.starts_with("for: ") => Some(format!("{indent}for: 1s\n")),
            // What has stood still for minutes, and what is late by an hour or a minute.
            _ => {
                let now = line.replace("[2m]", "[5s]").replace("> 3600", "> 1");
                Some(now.replace("_interval_seconds + 60", "_interval_seconds") + "\n")
            }
        }
    });
    lines.collect()
}

/// Body of a page on loopback; `None` unless the answer is 200.
pub fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    // This version of the protocol knows no chunks, and ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.split(' ').nth(1)?.eq("200").then(|| body.to_owned())
}

impl Prometheus {
    /// Starts the server on these sites: name and port of `/metrics`.
    pub fn start(mut command: Command, sites: &[(&str, u16)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut config = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n\
             rule_files: [rules.yml]\n\
             scrape_configs:\n  - job_name: lifeboat\n    static_configs:\n"
            .to_owned();
        for (name, port) in sites {
            config += &format!(
                "      - {{targets: ['127.0.0.1:{port}'], labels: {{instance: {name}}}}}\n"
            );
        }
        fs::write(at("prometheus.yml"), config).unwrap();
        fs::write(at("rules.yml"), impatient()).unwrap();
        let port = free_port();
        let log = fs::File::create(at("log")).unwrap();
        let server = command
            .arg(format!("--config.file={}", at("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", at("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn")
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
        wait("Prometheus is ready", || started.get("/-/ready").map(drop));
        started
    }

    fn get(&self, path: &str) -> Option<String> {
        get(self.port, path)
    }

    /// Samples of an instant query: labels and value.
    pub fn query(&self, query: &str) -> Vec<(Value, f64)> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.get(&format!("/api/v1/query?query={encoded}"));
        let answer = answer.unwrap_or_else(|| panic!("{query} was not answered: {}", self.log()));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let samples = answer["data"]["result"].as_array().unwrap();
        samples
            .iter()
            .map(|sample| {
                let value = sample["value"][1].as_str().unwrap();
                (sample["metric"].clone(), value.parse().unwrap())
            })
            .collect()
    }

    /// True if there is a sample that is a number.
    pub fn has_data(&self, query: &str) -> bool {
        let samples = self.query(query);
        samples.iter().any(|(_, value)| value.is_finite())
    }

    /// True while the alert fires for anything.
    pub fn fires(&self, alert: &str) -> bool {
        let query = format!(r#"ALERTS{{alertname="{alert}",alertstate="firing"}}"#);
        !self.query(&query).is_empty()
    }

    /// Waits until all of them fire, and until none of the others does.
    pub fn wait_for(&self, firing: &[&str], quiet: &[&str]) {
        wait(&format!("{firing:?} fire, {quiet:?} do not"), || {
            let all = firing.iter().all(|alert| self.fires(alert));
            let none = !quiet.iter().any(|alert| self.fires(alert));
            (all && none).then_some(())
        });
        println!("fired: {firing:?}, ended: {quiet:?}");
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.server.kill();
        let _ = self.server.wait();
        if std::thread::panicking() {
            println!("--- Prometheus\n{}", self.log());
        }
    }
}
