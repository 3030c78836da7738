"""The drivers of Java and C#, see `drivers`. FUNCTION stands for the name of the function.

The signature in the submission decides which types the arguments have, by reflection.
"""

JAVA = r"""
class KimiDriver {
  static final String s = input(); static int i = 0;
  static String input() {
    try { return new String(System.in.readAllBytes(), "UTF-8"); } catch (java.io.IOException e) { throw new Error(e); }
  }
  static char peek() { while (Character.isWhitespace(s.charAt(i))) ++i; return s.charAt(i); }
  static Object parse() {
    char c = peek();
    if (c == '[') {
      java.util.List<Object> list = new java.util.ArrayList<>();
      ++i;
      while (peek() != ']') { list.add(parse()); if (peek() == ',') ++i; }
      ++i; return list;
    }
    if (c == '{') {
      java.util.Map<Object, Object> map = new java.util.LinkedHashMap<>();
      ++i;
      while (peek() != '}') { Object k = parse(); peek(); ++i; map.put(k, parse()); if (peek() == ',') ++i; }
      ++i; return map;
    }
    if (c == '"') {
      StringBuilder b = new StringBuilder();
      for (++i; s.charAt(i) != '"'; ++i) {
        if (s.charAt(i) != '\\') { b.append(s.charAt(i)); continue; }
        int at = "nrtbf".indexOf(s.charAt(++i));
        if (s.charAt(i) == 'u') { b.append((char) Integer.parseInt(s.substring(i + 1, i + 5), 16)); i += 4; }
        else b.append(at < 0 ? s.charAt(i) : "\n\r\t\b\f".charAt(at));
      }
      ++i; return b.toString();
    }
    int from = i;
    while (i < s.length() && ",]} \t\r\n".indexOf(s.charAt(i)) < 0) ++i;
    String word = s.substring(from, i);
    return word.equals("null") ? null : word.equals("true") ? (Object) true : word.equals("false") ? (Object) false
      : new java.math.BigDecimal(word);
  }
  static Object fit(Object v, java.lang.reflect.Type t) {
    if (v == null) return null;
    if (t instanceof java.lang.reflect.ParameterizedType) {
      java.lang.reflect.Type[] of = ((java.lang.reflect.ParameterizedType) t).getActualTypeArguments();
      if (v instanceof java.util.Map) {
        java.util.Map<Object, Object> out = new java.util.HashMap<>();
        ((java.util.Map<?, ?>) v).forEach((k, x) -> out.put(fit(k, of[0]), fit(x, of[1])));
        return out;
      }
      String name = ((java.lang.reflect.ParameterizedType) t).getRawType().getTypeName();
      boolean set = name.endsWith("Set");
      java.util.Collection<Object> out = set ? new java.util.LinkedHashSet<>() : new java.util.ArrayList<>();
      for (Object x : (java.util.List<?>) v) out.add(fit(x, of[0]));
      return out;
    }
    Class<?> c = t instanceof Class ? (Class<?>) t : Object.class;
    if (c.isArray()) {
      java.util.List<?> list = (java.util.List<?>) v;
      Object out = java.lang.reflect.Array.newInstance(c.getComponentType(), list.size());
      for (int k = 0; k < list.size(); ++k) java.lang.reflect.Array.set(out, k, fit(list.get(k), c.getComponentType()));
      return out;
    }
    if (v instanceof java.math.BigDecimal) {
      java.math.BigDecimal n = (java.math.BigDecimal) v;
      if (c == int.class || c == Integer.class) return n.intValueExact();
      if (c == long.class || c == Long.class) return n.longValueExact();
      if (c == double.class || c == Double.class) return n.doubleValue();
      if (c == float.class || c == Float.class) return n.floatValue();
      return n.scale() <= 0 ? (Object) n.longValueExact() : (Object) n.doubleValue();
    }
    if (c == char.class || c == Character.class) return ((String) v).charAt(0);
    return v;
  }
  static void print(Object v, StringBuilder b) {
    if (v instanceof java.util.Optional) v = ((java.util.Optional<?>) v).orElse(null);
    if (v == null || v instanceof Number || v instanceof Boolean) b.append(v);
    else if (v instanceof java.util.Map) {
      String comma = "{";
      if (((java.util.Map<?, ?>) v).isEmpty()) b.append(comma);
      for (java.util.Map.Entry<?, ?> e : ((java.util.Map<?, ?>) v).entrySet()) {
        b.append(comma); comma = ",";
        print(String.valueOf(e.getKey()), b); b.append(":"); print(e.getValue(), b);
      }
      b.append("}");
    } else if (v instanceof Iterable || v.getClass().isArray()) {
      java.util.List<Object> list = new java.util.ArrayList<>();
      if (v instanceof Iterable) ((Iterable<?>) v).forEach(list::add);
      else for (int k = 0; k < java.lang.reflect.Array.getLength(v); ++k) list.add(java.lang.reflect.Array.get(v, k));
      b.append("[");
      for (int k = 0; k < list.size(); ++k) { if (k > 0) b.append(","); print(list.get(k), b); }
      b.append("]");
    } else {
      b.append('"');
      for (char c : v.toString().toCharArray())
        if (c == '"' || c == '\\') b.append('\\').append(c);
        else if (c < 32 || c > 126) b.append(String.format("\\u%04x", (int) c)); else b.append(c);
      b.append('"');
    }
  }
}
public class Main {
  public static void main(String[] arguments) throws Throwable {
    for (java.lang.reflect.Method m : Solution.class.getDeclaredMethods()) {
      if (!m.getName().equals("FUNCTION")) continue;
      java.util.List<?> given = (java.util.List<?>) KimiDriver.parse();
      java.lang.reflect.Type[] types = m.getGenericParameterTypes();
      Object[] values = new Object[types.length];
      for (int k = 0; k < types.length; ++k) values[k] = KimiDriver.fit(given.get(k), types[k]);
      java.lang.reflect.Constructor<?> maker = Solution.class.getDeclaredConstructor();
      maker.setAccessible(true); m.setAccessible(true);
      StringBuilder b = new StringBuilder();
      try { KimiDriver.print(m.invoke(maker.newInstance(), values), b); }
      catch (java.lang.reflect.InvocationTargetException e) { throw e.getCause(); }
      System.out.println("\n" + b); return;
    }
    throw new NoSuchMethodException("class Solution has no method FUNCTION");
  }
}
"""

CSHARP = r"""
static class KimiDriver {
  static string s; static int i = 0;
  static char Peek() { while (char.IsWhiteSpace(s[i])) ++i; return s[i]; }
  static object Parse() {
    char c = Peek();
    if (c == '[') {
      var list = new System.Collections.Generic.List<object>();
      ++i;
      while (Peek() != ']') { list.Add(Parse()); if (Peek() == ',') ++i; }
      ++i; return list;
    }
    if (c == '{') {
      var map = new System.Collections.Generic.Dictionary<string, object>();
      ++i;
      while (Peek() != '}') { var k = (string) Parse(); Peek(); ++i; map[k] = Parse(); if (Peek() == ',') ++i; }
      ++i; return map;
    }
    if (c == '"') {
      var b = new System.Text.StringBuilder();
      for (++i; s[i] != '"'; ++i) {
        if (s[i] != '\\') { b.Append(s[i]); continue; }
        int at = "nrtbf".IndexOf(s[++i]);
        if (s[i] == 'u') { b.Append((char) System.Convert.ToInt32(s.Substring(i + 1, 4), 16)); i += 4; }
        else b.Append(at < 0 ? s[i] : "\n\r\t\b\f"[at]);
      }
      ++i; return b.ToString();
    }
    int from = i;
    while (i < s.Length && ",]} \t\r\n".IndexOf(s[i]) < 0) ++i;
    string word = s.Substring(from, i - from);
    if (word == "null") return null;
    if (word == "true" || word == "false") return word == "true";
    long n;
    if (long.TryParse(word, out n)) return n;
    return double.Parse(word, System.Globalization.CultureInfo.InvariantCulture);
  }
  static object Fit(object v, System.Type t) {
    t = System.Nullable.GetUnderlyingType(t) ?? t;
    if (v == null || t.IsInstanceOfType(v)) return v;
    var list = v as System.Collections.Generic.List<object>;
    var map = v as System.Collections.Generic.Dictionary<string, object>;
    if (map != null) {
      var of = t.GetGenericArguments();
      var kind = typeof(System.Collections.Generic.Dictionary<,>).MakeGenericType(of);
      var made = (System.Collections.IDictionary) System.Activator.CreateInstance(kind);
      foreach (var e in map) made[Fit(e.Key, of[0])] = Fit(e.Value, of[1]);
      return made;
    }
    if (list != null && t.IsArray) {
      var made = System.Array.CreateInstance(t.GetElementType(), list.Count);
      for (int k = 0; k < list.Count; ++k) made.SetValue(Fit(list[k], t.GetElementType()), k);
      return made;
    }
    if (list != null) {
      var of = t.GetGenericArguments()[0];
      var made = System.Activator.CreateInstance(
        t.IsInterface ? typeof(System.Collections.Generic.List<>).MakeGenericType(of) : t);
      var add = made.GetType().GetMethod("Add", new[] { of });
      foreach (var x in list) add.Invoke(made, new[] { Fit(x, of) });
      return made;
    }
    if (t == typeof(char)) return ((string) v)[0];
    return System.Convert.ChangeType(v, t, System.Globalization.CultureInfo.InvariantCulture);
  }
  static void Print(object v, System.Text.StringBuilder b) {
    var culture = System.Globalization.CultureInfo.InvariantCulture;
    if (v == null) b.Append("null");
    else if (v is bool) b.Append((bool) v ? "true" : "false");
    else if (v is double) b.Append(((double) v).ToString("R", culture));
    else if (v is string || v is char) {
      b.Append('"');
      foreach (char c in v.ToString())
        if (c == '"' || c == '\\') b.Append('\\').Append(c);
        else if (c < 32 || c > 126) b.AppendFormat("\\u{0:x4}", (int) c); else b.Append(c);
      b.Append('"');
    } else if (v is System.Collections.IDictionary) {
      string comma = "";
      b.Append('{');
      foreach (System.Collections.DictionaryEntry e in (System.Collections.IDictionary) v) {
        b.Append(comma); comma = ",";
        Print(e.Key.ToString(), b); b.Append(':'); Print(e.Value, b);
      }
      b.Append('}');
    } else if (v is System.Collections.IEnumerable) {
      string comma = "";
      b.Append('[');
      foreach (object x in (System.Collections.IEnumerable) v) { b.Append(comma); comma = ","; Print(x, b); }
      b.Append(']');
    } else b.Append(System.Convert.ToString(v, culture));
  }
  static void Main() {
    s = new System.IO.StreamReader(System.Console.OpenStandardInput()).ReadToEnd();
    var flags = System.Reflection.BindingFlags.Public | System.Reflection.BindingFlags.NonPublic
      | System.Reflection.BindingFlags.Instance | System.Reflection.BindingFlags.Static;
    var method = typeof(Solution).GetMethod("FUNCTION", flags);
    var given = (System.Collections.Generic.List<object>) Parse();
    var values = new object[given.Count];
    for (int k = 0; k < values.Length; ++k) values[k] = Fit(given[k], method.GetParameters()[k].ParameterType);
    var b = new System.Text.StringBuilder();
    Print(method.Invoke(method.IsStatic ? null : System.Activator.CreateInstance(typeof(Solution)), values), b);
    System.Console.WriteLine("\n" + b);
  }
}
"""
