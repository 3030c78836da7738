"""The same tasks in every language: twice a number, the sum of a list, and programs that fail in the usual ways."""

DOUBLE = {
    "python": "print(2 * int(input()))",
    "java": "import java.util.*;\npublic class Twice { public static void main(String[] a) "
    "{ System.out.println(2 * new Scanner(System.in).nextInt()); } }",
    "cpp": "#include <iostream>\nint main() { int x; std::cin >> x; std::cout << 2 * x; }",
    "csharp": "using System; class P { static void Main() { Console.WriteLine(2 * int.Parse(Console.ReadLine())); } }",
    "javascript": "console.log(2 * parseInt(require('fs').readFileSync(0, 'utf8')))",
    "typescript": "const x: number = parseInt(require('fs').readFileSync(0, 'utf8')); console.log(2 * x)",
    "php": "<?php echo 2 * intval(fgets(STDIN));",
    "bash": "read x; echo $((2 * x))",
    "go": 'package main\nimport "fmt"\nfunc main() { var x int; fmt.Scan(&x); fmt.Println(2 * x) }',
    "rust": "use std::io; fn main() { let mut s = String::new(); io::stdin().read_line(&mut s).unwrap(); "
    'println!("{}", 2 * s.trim().parse::<i64>().unwrap()); }',
}
DOES_NOT_COMPILE = {
    "java": "public class Main { int x = ; }",
    "cpp": "int main() { return y; }",
    "csharp": 'class P { static void Main() { int x = "a"; } }',
    "typescript": "const x = = 1;",
    "go": "package main\nfunc main() { x := 1 }",
    "rust": 'fn main() { let x: i32 = "a"; }',
}
EXITS_WITH_3 = {
    "python": "exit(3)",
    "java": "public class Main { public static void main(String[] a) { System.exit(3); } }",
    "cpp": "int main() { return 3; }",
    "csharp": "class P { static int Main() { return 3; } }",
    "javascript": "process.exit(3)",
    "typescript": "process.exit(3)",
    "php": "<?php exit(3);",
    "bash": "exit 3",
    "go": 'package main\nimport "os"\nfunc main() { os.Exit(3) }',
    "rust": "fn main() { std::process::exit(3) }",
}
TAKES_MEMORY = {
    "python": "x = []\nwhile True: x.append(bytes(10**6))",
    "java": "import java.util.*; public class Main { public static void main(String[] a) "
    "{ List<long[]> x = new ArrayList<>(); while (true) x.add(new long[100000]); } }",
    "cpp": "#include <vector>\nint main() { std::vector<std::vector<int>> x; while (true) x.emplace_back(100000, 1); }",
    "csharp": "using System.Collections.Generic; class P { static void Main() { var x = new List<long[]>(); "
    "while (true) { var y = new long[100000]; for (int i = 0; i < y.Length; ++i) y[i] = i; x.Add(y); } } }",
    "javascript": "const x = []; while (true) x.push(new Array(100000).fill(x.length / 3))",
    "typescript": "const x: number[][] = []; while (true) x.push(new Array(100000).fill(x.length / 3))",
    "php": "<?php $x = []; while (true) $x[] = range(1, 100000);",
    "bash": 'x=xxxxxxxxxxxxxxxx; while true; do x="$x$x"; done',
    "go": "package main\nfunc main() { var x [][]int; for { y := make([]int, 100000); for i := range y { y[i] = i }; "
    "x = append(x, y) } }",
    "rust": "fn main() { let mut x: Vec<Vec<u64>> = Vec::new(); loop { x.push(vec![x.len() as u64 + 1; 100000]); } }",
}
# weigh(xs, ys, name) = [sum(xs) + sum of all ys, name backwards]; ys is a list of lists
WEIGH = {
    "python": "class Solution:\n    def weigh(self, xs: List[int], ys: List[List[float]], name: str):\n"
    "        return [sum(xs) + sum(map(sum, ys)), name[::-1]]",
    "javascript": "const weigh = (xs, ys, name) =>\n"
    "  [[...xs, ...ys.flat()].reduce((a, b) => a + b, 0), [...name].reverse().join('')]",
    "typescript": "function weigh(xs: number[], ys: number[][], name: string): any {\n"
    "  return [[...xs, ...([] as number[]).concat(...ys)].reduce((a, b) => a + b, 0), [...name].reverse().join('')] }",
    "php": "<?php class Solution { function weigh($xs, $ys, $name) { $s = array_sum($xs);\n"
    "foreach ($ys as $y) $s += array_sum($y); preg_match_all('/./us', $name, $m);\n"
    "return [$s, implode('', array_reverse($m[0]))]; } }",
    "java": "public class Solution { public List<Object> weigh(int[] xs, List<List<Double>> ys, String name) {\n"
    "double s = 0; for (int x : xs) s += x; for (List<Double> y : ys) for (double x : y) s += x;\n"
    "return Arrays.asList((Object) s, new StringBuilder(name).reverse().toString()); } }",
    "csharp": "public class Solution { public List<object> weigh(int[] xs, IList<IList<double>> ys, string name) {\n"
    "double s = xs.Sum() + ys.Sum(y => y.Sum()); var r = name.ToCharArray(); Array.Reverse(r);\n"
    "return new List<object> { s, new string(r) }; } }",
    "go": "package main\nfunc weigh(xs []int, ys [][]float64, name string) []interface{} {\n"
    "s := 0.0; for _, x := range xs { s += float64(x) }; for _, y := range ys { for _, x := range y { s += x } }\n"
    'r := ""; for _, c := range name { r = string(c) + r }; return []interface{}{s, r} }',
}
# of one type, as C++ wants it: total(xs, ys) = [sum of xs, sum of each of ys...]; echo(name) = name
TOTAL = {
    "python": "def total(xs, ys): return [sum(xs), *map(sum, ys)]",
    "cpp": "class Solution { public: vector<double> total(vector<int>& xs, const vector<vector<double>>& ys) {\n"
    "vector<double> r{double(accumulate(xs.begin(), xs.end(), 0))};\n"
    "for (auto& y : ys) r.push_back(accumulate(y.begin(), y.end(), 0.0)); return r; } };",
    "rust": "impl Solution { pub fn total(xs: Vec<i32>, ys: Vec<Vec<f64>>) -> Vec<f64> {\n"
    "let mut r = vec![xs.iter().sum::<i32>() as f64]; r.extend(ys.iter().map(|y| y.iter().sum::<f64>())); r } }",
    "java": "class Solution { double[] total(List<Integer> xs, double[][] ys) {\n"
    "double[] r = new double[1 + ys.length]; for (int x : xs) r[0] += x;\n"
    "for (int i = 0; i < ys.length; ++i) for (double x : ys[i]) r[i + 1] += x; return r; } }",
}
ECHO = {  # of PHP, where echo is a word of the language, echo_
    "python": "def echo(name): return name",
    "javascript": "function echo(name) { return name }",
    "cpp": "string echo(string name) { return name; }",
    "java": "class Solution { static String echo(String name) { return name; } }",
    "bash": 'echo() { printf "%s\\n" "$1"; }',
    "php": "<?php function echo_($x) { return $x; }",
    "csharp": "class Solution { static string echo(string name) { return name; } }",
    "rust": "fn echo(name: String) -> String { name }",
    "go": "package main\nfunc echo(name string) string { return name }",
}
