//! The Python peer of the speed benchmark (`benches/peer.py`), on the same device.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;
use tch::Device;

use super::report::measured;
use super::speed::{Lengths, Workload};
use super::{Account, Options};
use crate::error::Result;
use crate::libtorch;
use crate::statistics::median;

const SCRIPT: &str = "benches/peer.py";
const LENGTHS: &str = "benches/rte_lengths.txt";
const WARM_UP: usize = 3;
const STEPS: usize = 10;
const ROUNDS: usize = 3;

/// Training of a workload by transformers.
#[derive(Clone, Debug, Serialize)]
pub struct PeerRow {
    /// Shape and lengths.
    pub workload: String,
    /// `vanilla` (torch's fused AdamW) or `child_tuning_f` (the released optimizer).
    pub method: &'static str,
    /// `float32` or `bf16` (autocast).
    pub precision: &'static str,
    /// Real tokens a second, the median of the rounds; or why there is none.
    #[serde(serialize_with = "measured")]
    pub outcome: std::result::Result<f64, String>,
}

/// Measures the peer on the workloads, in bf16 (autocast) and float32.
pub(super) fn measure(workloads: &[Workload], options: Options, account: &mut Account) -> Result<()> {
    for workload in workloads {
        for (method, precision) in [("vanilla", "bf16"), ("child_tuning_f", "bf16"), ("vanilla", "float32")] {
            let outcome = if options.quick {
                Err("not part of a quick run".to_owned())
            } else {
                account.note(&format!("{}: the Python peer, {method} in {precision} …", workload.name));
                tokens_per_second(workload, method, precision, options.device)
            };
            if let Ok(speed) = &outcome {
                account.note(&format!("{speed:.0} tokens/s"));
            }
            account.report.peer.push(PeerRow { workload: workload.name.clone(), method, precision, outcome });
            account.keep()?;
        }
    }
    Ok(())
}

fn tokens_per_second(
    workload: &Workload,
    method: &str,
    precision: &str,
    device: Device,
) -> std::result::Result<f64, String> {
    if !Path::new(SCRIPT).exists() {
        return Err(format!("{SCRIPT} is not in this folder"));
    }
    let device = match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    };
    let mut command = Command::new("python3");
    command.arg(SCRIPT).args(["--method", method, "--precision", precision]);
    command.args(["--shape", workload.shape.name, "--device", &device]);
    command.args(["--batch-size", &workload.batch_size.to_string()]);
    match workload.lengths {
        Lengths::OfRte => command.args(["--lengths", LENGTHS]),
        Lengths::Equal(tokens) => command.args(["--tokens", &tokens.to_string()]),
    };
    // What this program was started with is not the peer's: it is to find its own libraries, and to run as it comes.
    for name in libtorch::own_settings() {
        command.env_remove(name);
    }
    // The launcher of the bundle has put libraries before those of the machine, such as the driver's.
    match std::env::var(libtorch::OUTER_LIBRARY_PATH) {
        Ok(outer) if outer.is_empty() => command.env_remove("LD_LIBRARY_PATH"),
        Ok(outer) => command.env("LD_LIBRARY_PATH", outer),
        Err(_) => &mut command,
    };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut peer = command.spawn().map_err(|error| format!("python3 does not start: {error}"))?;
    let (input, output, complaints) = (peer.stdin.take(), peer.stdout.take(), peer.stderr.take());
    // Read beside the conversation: a pipe that is full would hold the peer up.
    let listener = std::thread::spawn(move || {
        let lines =
            complaints.into_iter().flat_map(|text| BufReader::new(text).lines().map_while(Result::ok));
        lines.filter(|line| !line.trim().is_empty()).last()
    });
    let speeds = match (input, output) {
        (Some(input), Some(output)) => converse(input, BufReader::new(output)),
        _ => None,
    };
    peer.wait().map_err(|error| error.to_string())?;
    // A Python error ends with what is wrong.
    let last_words = listener.join().ok().flatten();
    let speeds =
        speeds.ok_or_else(|| last_words.map_or("it said nothing".into(), |line| line.trim().to_owned()))?;
    median(&speeds).ok_or_else(|| "it measured nothing".to_owned())
}

/// Speaks the protocol of the script: `go N` in, a line of JSON out.
fn converse(mut input: impl Write, output: impl BufRead) -> Option<Vec<f64>> {
    let mut answers = output.lines();
    let mut answer = || serde_json::from_str::<Value>(&answers.next()?.ok()?).ok();
    answer()?.get("ready")?;
    let mut go = |steps: usize| {
        writeln!(input, "go {steps}").and_then(|()| input.flush()).ok()?;
        let answer = answer()?;
        Some(answer.get("tokens")?.as_f64()? / answer.get("seconds")?.as_f64()?)
    };
    go(WARM_UP)?;
    (0..ROUNDS).map(|_| go(STEPS)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_that_of_the_script() {
        let mut asked = Vec::new();
        let answers =
            (0..=ROUNDS).map(|round| format!("{{\"seconds\": 2.0, \"tokens\": {}}}\n", round * 100));
        let output = "{\"ready\": true}\n".to_owned() + &answers.collect::<String>();
        let speeds = converse(&mut asked, output.as_bytes()).unwrap();
        assert_eq!(speeds, [50.0, 100.0, 150.0]);
        assert!(String::from_utf8(asked).unwrap().starts_with("go 3\ngo 10\n"));
        assert!(converse(Vec::new(), "Traceback\n".as_bytes()).is_none());
    }
}
