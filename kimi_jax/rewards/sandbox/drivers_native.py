"""The drivers of C++, Go and Rust, see `drivers`. FUNCTION stands for the name of the function.

The signature in the submission decides which types the arguments have: by templates, reflection and traits.
"""

CPP_HEAD = "#include <bits/stdc++.h>\nusing namespace std;\n"
CPP = r"""
namespace driver {
struct In {
  std::string s; size_t i = 0;
  char peek() { while (i < s.size() && isspace((unsigned char)s[i])) ++i; return i < s.size() ? s[i] : 0; }
  void eat(char c) { if (peek() != c) throw std::runtime_error("the arguments do not fit the function"); ++i; }
  bool next(char end) { if (peek() == ',') ++i; if (peek() == end) { ++i; return false; } return true; }
};
inline void get(In& in, std::string& v) {
  in.eat('"'); v.clear();
  auto hex = [&] { unsigned u = std::stoul(in.s.substr(in.i + 1, 4), nullptr, 16); in.i += 4; return u; };
  for (; in.s.at(in.i) != '"'; ++in.i) {
    if (in.s[in.i] != '\\') { v += in.s[in.i]; continue; }
    char c = in.s.at(++in.i);
    const char *from = "nrtbf", *to = "\n\r\t\b\f", *at = strchr(from, c);
    if (c != 'u') { v += at ? to[at - from] : c; continue; }
    unsigned u = hex();
    if (u >= 0xD800 && u < 0xDC00) { in.i += 2; u = 0x10000 + ((u - 0xD800) << 10) + (hex() - 0xDC00); }
    if (u < 0x80) v += char(u);
    else if (u < 0x800) { v += char(0xC0 | u >> 6); v += char(0x80 | (u & 63)); }
    else {
      if (u < 0x10000) v += char(0xE0 | u >> 12);
      else { v += char(0xF0 | u >> 18); v += char(0x80 | (u >> 12 & 63)); }
      v += char(0x80 | (u >> 6 & 63)); v += char(0x80 | (u & 63));
    }
  }
  ++in.i;
}
inline void get(In& in, char& v) { std::string s; get(in, s); v = s.at(0); }
inline void get(In& in, bool& v) { v = in.peek() == 't'; in.i += v ? 4 : 5; }
template <class T> std::enable_if_t<std::is_arithmetic_v<T>> get(In& in, T& v) {
  in.peek(); size_t n = in.s.find_first_not_of("+-0123456789.eE", in.i);
  std::string t = in.s.substr(in.i, n - in.i);
  in.i += t.size(); std::istringstream(t) >> v;
}
template <class A, class B> void get(In& in, std::pair<A, B>& v) {
  in.eat('['); get(in, v.first); in.eat(','); get(in, v.second); in.eat(']');
}
template <class T> void get(In& in, std::vector<T>& v) {
  v.clear(); in.eat('[');
  while (in.next(']')) { T x{}; get(in, x); v.push_back(std::move(x)); }
}
inline void put(const std::string& v) {
  putchar('"');
  for (unsigned char c : v)
    if (c == '"' || c == '\\') printf("\\%c", c); else if (c < 32) printf("\\u%04x", c); else putchar(c);
  putchar('"');
}
inline void put(const char* v) { put(std::string(v)); }
inline void put(char v) { put(std::string(1, v)); }
inline void put(bool v) { printf(v ? "true" : "false"); }
template <class T> std::enable_if_t<std::is_arithmetic_v<T>> put(T v) {
  std::ostringstream o; o.precision(17); o << v; printf("%s", o.str().c_str());
}
template <class A, class B> void put(const std::pair<A, B>& v) {
  putchar('['); put(v.first); putchar(','); put(v.second); putchar(']');
}
template <class C> auto put(const C& v) -> decltype(v.begin(), void()) {
  const char* comma = "["; if (v.begin() == v.end()) putchar('[');
  for (const auto& x : v) { printf("%s", comma); put(static_cast<const typename C::value_type&>(x)); comma = ","; }
  putchar(']');
}
template <class R, class F, class... A> void apply(F f) {
  In in{std::string(std::istreambuf_iterator<char>(std::cin), {})};
  std::tuple<std::decay_t<A>...> a; in.eat('[');
  std::apply([&](auto&... x) { (void)std::initializer_list<int>{(in.next(']'), get(in, x), 0)...}; }, a);
  auto value = std::apply([&](auto&... x) -> R { return f(x...); }, a);
  std::cout.flush(); printf("\n"); put(value); printf("\n");
}
template <class R, class... A> void call(R (*f)(A...)) { apply<R, decltype(f), A...>(f); }
template <class S, class R, class... A> void call(R (S::*m)(A...)) {
  S s; auto f = [&](auto&... x) -> R { return (s.*m)(x...); }; apply<R, decltype(f), A...>(f);
}
template <class S, class R, class... A> void call(R (S::*m)(A...) const) {
  S s; auto f = [&](auto&... x) -> R { return (s.*m)(x...); }; apply<R, decltype(f), A...>(f);
}
}
int main() { driver::call(&FUNCTION); }
"""

GO = r"""package main

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
)

func main() {
	var given []json.RawMessage
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	function := reflect.ValueOf(FUNCTION)
	values := make([]reflect.Value, function.Type().NumIn())
	for i := range values {
		value := reflect.New(function.Type().In(i))
		if err := json.Unmarshal(given[i], value.Interface()); err != nil {
			panic(err)
		}
		values[i] = value.Elem()
	}
	var results []interface{}
	for _, result := range function.Call(values) {
		results = append(results, result.Interface())
	}
	var value interface{} = results
	if len(results) == 1 {
		value = results[0]
		if v := reflect.ValueOf(value); v.Kind() == reflect.Slice && v.Len() == 0 {
			value = []int{}
		}
	}
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	fmt.Println("\n" + string(text))
}
"""

RUST = r"""
mod kimi_driver {
    pub struct In { pub s: Vec<char>, pub i: usize }
    impl In {
        fn peek(&mut self) -> char { while self.s[self.i].is_whitespace() { self.i += 1 } self.s[self.i] }
        pub fn eat(&mut self, c: char) { assert_eq!(self.peek(), c, "the arguments do not fit"); self.i += 1 }
        pub fn next(&mut self, end: char) -> bool {
            if self.peek() == ',' { self.i += 1 }
            if self.peek() == end { self.i += 1; return false }
            true
        }
        fn word(&mut self) -> String {
            self.peek();
            let from = self.i;
            while self.i < self.s.len() && !",]} \t\r\n".contains(self.s[self.i]) { self.i += 1 }
            self.s[from..self.i].iter().collect()
        }
        fn hex(&mut self) -> u32 {
            let text: String = self.s[self.i + 1..self.i + 5].iter().collect();
            self.i += 4;
            u32::from_str_radix(&text, 16).unwrap()
        }
    }
    pub trait Get { fn get(s: &mut In) -> Self; }
    pub trait Put { fn put(&self) -> String; }
    macro_rules! numbers { ($($t:ty)*) => { $(
        impl Get for $t { fn get(s: &mut In) -> Self { s.word().parse().unwrap() } }
        impl Put for $t { fn put(&self) -> String { self.to_string() } }
    )* } }
    numbers!(i8 i16 i32 i64 i128 isize u8 u16 u32 u64 u128 usize f32 f64 bool);
    impl Get for String {
        fn get(s: &mut In) -> Self {
            s.eat('"');
            let mut out = String::new();
            while s.s[s.i] != '"' {
                let mut c = s.s[s.i];
                if c == '\\' {
                    s.i += 1;
                    c = match s.s[s.i] {
                        'n' => '\n', 'r' => '\r', 't' => '\t', 'b' => '\u{8}', 'f' => '\u{c}',
                        'u' => {
                            let mut u = s.hex();
                            if (0xD800..0xDC00).contains(&u) {
                                s.i += 2;
                                u = 0x10000 + ((u - 0xD800) << 10) + (s.hex() - 0xDC00);
                            }
                            char::from_u32(u).unwrap()
                        }
                        other => other,
                    };
                }
                out.push(c);
                s.i += 1;
            }
            s.i += 1;
            out
        }
    }
    impl Get for char { fn get(s: &mut In) -> Self { String::get(s).chars().next().unwrap() } }
    impl<T: Get> Get for Vec<T> {
        fn get(s: &mut In) -> Self {
            s.eat('[');
            let mut out = Vec::new();
            while s.next(']') { out.push(T::get(s)) }
            out
        }
    }
    impl<T: Get> Get for Option<T> {
        fn get(s: &mut In) -> Self {
            if s.peek() == 'n' { s.word(); None } else { Some(T::get(s)) }
        }
    }
    impl Put for String {
        fn put(&self) -> String {
            let escape = |c: char| match c {
                '"' | '\\' => format!("\\{}", c),
                c if (c as u32) < 32 => format!("\\u{:04x}", c as u32),
                c => c.to_string(),
            };
            format!("\"{}\"", self.chars().map(escape).collect::<String>())
        }
    }
    impl Put for &str { fn put(&self) -> String { self.to_string().put() } }
    impl Put for char { fn put(&self) -> String { self.to_string().put() } }
    impl Put for () { fn put(&self) -> String { "null".to_string() } }
    impl<T: Put> Put for Vec<T> {
        fn put(&self) -> String { format!("[{}]", self.iter().map(|x| x.put()).collect::<Vec<_>>().join(",")) }
    }
    impl<T: Put> Put for Option<T> {
        fn put(&self) -> String { self.as_ref().map_or("null".to_string(), |x| x.put()) }
    }
    impl<A: Put, B: Put> Put for (A, B) { fn put(&self) -> String { format!("[{},{}]", self.0.put(), self.1.put()) } }
    pub trait Call<A> { fn call(self, s: &mut In) -> String; }
    macro_rules! calls { ($($t:ident)*) => {
        impl<F: FnOnce($($t),*) -> R, R: Put, $($t: Get),*> Call<($($t,)*)> for F {
            #[allow(unused_variables)]
            fn call(self, s: &mut In) -> String { self($({ s.next(']'); $t::get(s) }),*).put() }
        }
    } }
    calls!(); calls!(A); calls!(A B); calls!(A B C); calls!(A B C D); calls!(A B C D E); calls!(A B C D E G);
}
fn main() {
    let text = std::io::read_to_string(std::io::stdin()).unwrap();
    let mut input = kimi_driver::In { s: text.chars().collect(), i: 0 };
    input.eat('[');
    println!("\n{}", kimi_driver::Call::call(FUNCTION, &mut input));
}
"""
